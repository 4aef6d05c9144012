// A block goes over one window of the map as it lies, so that its threads read few windows of each copy and
// write whole sectors; a thread does W neighbouring voxels of all the rows.
#include <type_traits>

#include "cuda/nmf/rank_one.cuh"
#include "cuda/windows/tile.cuh"

namespace factorizer {
namespace cuda {
namespace {

constexpr int most_threads = 256;

template <int W>
__global__ void __launch_bounds__(most_threads)
    products_kernel(const DeviceWindows windows, const int rank, const float* const u, const float* const v,
                    const Map y) {
  const Window window = windows.window(windows.num_shifts, blockIdx.x);
  const float scale = 1.0f / windows.num_shifts;
  for (u32 n = W * threadIdx.x; n < windows.columns; n += W * blockDim.x) {
    u32 at[3];
    windows.voxel(window, n, at);
    float sum[max_rows][W] = {};
    for (u32 copy = 0; copy < windows.num_shifts; ++copy) {
      u32 column;
      const i64 first = windows.matrix_at(window, copy, at, column) * rank;
      for (int r = 0; r < rank; ++r) {
        float v_at[W];
        read(v + (first + r) * windows.columns + column, v_at);
        FK_UNROLL
        for (int m = 0; m < max_rows; ++m) {
          const float u_at = m < windows.rows ? u[(first + r) * windows.rows + m] : 0.0f;
          FK_UNROLL
          for (int c = 0; c < W; ++c) sum[m][c] += u_at * v_at[c];
        }
      }
    }
    with_storage(y.data, y.dtype, [&](auto* data) {
      auto* to = data + DeviceWindows::origin(window, y) + DeviceWindows::offset(at, y);
      FK_UNROLL
      for (int m = 0; m < max_rows; ++m) {
        if (m >= windows.rows) continue;
        FK_UNROLL
        for (int c = 0; c < W; ++c) sum[m][c] *= scale;
        write(to + m * y.stride[1], sum[m]);
      }
    });
  }
}

template <int W>
__global__ void __launch_bounds__(most_threads)
    gradients_kernel(const DeviceWindows windows, const Map x, const Factor v0,
                     const Coefficients* const coefficients, const float* const dv, const Map dx) {
  const Window window = windows.window(windows.num_shifts, blockIdx.x);
  for (u32 n = W * threadIdx.x; n < windows.columns; n += W * blockDim.x) {
    u32 at[3];
    windows.voxel(window, n, at);
    float values[max_rows][W] = {}, grad[max_rows][W] = {};
    with_storage(x.data, x.dtype, [&](auto* data) {
      const auto* from = data + DeviceWindows::origin(window, x) + DeviceWindows::offset(at, x);
      FK_UNROLL
      for (int m = 0; m < max_rows; ++m) {
        if (m < windows.rows) read(from + m * x.stride[1], values[m]);
      }
    });
    relu_rows(values);
    for (u32 copy = 0; copy < windows.num_shifts; ++copy) {
      u32 column;
      const i64 matrix = windows.matrix_at(window, copy, at, column);
      float dv_at[W], v0_at[W];
      read(dv + matrix * windows.columns + column, dv_at);
      read(of_matrix(v0, matrix) + column, v0_at);
      add_gradient(coefficients[matrix], values, dv_at, v0_at, grad);
    }
    mask_rows(values, grad);
    with_storage(dx.data, dx.dtype, [&](auto* data) {
      auto* to = data + DeviceWindows::origin(window, dx) + DeviceWindows::offset(at, dx);
      FK_UNROLL
      for (int m = 0; m < max_rows; ++m) {
        if (m < windows.rows) write(to + m * dx.stride[1], grad[m]);
      }
    });
  }
}

template <class F>
void with_width(const DeviceWindows& windows, F&& f) {
  if (windows.wide) {
    f(std::integral_constant<int, chunk>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

int threads_for(const DeviceWindows& windows, int width) {
  const int threads = round_up((windows.columns + width - 1) / width, 32);
  return threads < most_threads ? threads : most_threads;
}

}  // namespace

void gather_products(const Launcher& launch, const DeviceWindows& windows, i64 rank, const float* u,
                     const float* v, const Map& y) {
  with_width(windows, [&](auto width) {
    launch(products_kernel<width()>, windows.per_shift, threads_for(windows, width()), windows,
           static_cast<int>(rank), u, v, y);
  });
}

void gather_gradients(const Launcher& launch, const DeviceWindows& windows, const Map& x, const Factor& v0,
                      const Coefficients* coefficients, const float* dv, const Map& dx) {
  with_width(windows, [&](auto width) {
    launch(gradients_kernel<width()>, windows.per_shift, threads_for(windows, width()), windows, x, v0,
           coefficients, dv, dx);
  });
}

}  // namespace cuda
}  // namespace factorizer

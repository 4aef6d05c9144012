// A block goes over one box of the map as it lies, so that its threads read few windows of each copy and
// write whole lines; a thread does W neighbouring voxels of all the rows. What the block needs of the windows
// that meet the box, beside a number for each voxel, it keeps in shared memory.
#include <type_traits>

#include "cuda/nmf/rank_one.cuh"
#include "cuda/windows/boxes.cuh"
#include "cuda/windows/tile.cuh"

namespace factorizer {
namespace cuda {
namespace {

constexpr int most_threads = 256;
constexpr i64 line = 128;  // bytes

// The windows that meet a block's box.
struct Met {
  int matrix[max_met];  // -1: it does not
  u32 begin[max_shifts][3];

  // The block meets after it.
  FK_DEVICE void find(const Boxes& boxes, const Window& box) {
    for (u32 i = threadIdx.x; i < boxes.num_met(); i += blockDim.x) matrix[i] = boxes.matrix(box, i);
    if (threadIdx.x < boxes.windows.num_shifts) {
      u32 cell[3];
      boxes.place(box, threadIdx.x, begin[threadIdx.x], cell);
    }
    __syncthreads();
  }
};

// Calls f(at, voxel) for every W-th voxel of a box that is this thread's: where it lies in the box, and in
// the map.
template <int W, class F>
FK_DEVICE void for_voxels(const Boxes& boxes, const Window& box, F&& f) {
  for (u32 n = W * threadIdx.x; n < boxes.cut.columns; n += W * blockDim.x) {
    u32 rest = n, at[3];
    at[2] = boxes.cut.by_patch[2].split(rest);
    at[1] = boxes.cut.by_patch[1].split(rest);
    at[0] = rest;
    // The map as it lies is not rolled: no box goes past an end.
    const u32 voxel[3] = {box.start[0] + at[0], box.start[1] + at[1], box.start[2] + at[2]};
    f(at, voxel);
  }
}

template <int W, class S>
__global__ void __launch_bounds__(most_threads)
    products_kernel(const Boxes boxes, const int rank, const float* const u, const float* const v,
                    const Map y) {
  __shared__ Met met;
  alignas(16) __shared__ float factors[max_met * max_rank * max_rows];  // u, rank x max_rows of a window
  const DeviceWindows& windows = boxes.windows;
  const Window box = boxes.cut.window(windows.num_shifts, blockIdx.x);
  met.find(boxes, box);
  for (u32 i = threadIdx.x; i < boxes.num_met() * rank * max_rows; i += blockDim.x) {
    const int m = i % max_rows, row = i / max_rows, matrix = met.matrix[row / rank];
    if (matrix < 0) continue;
    const i64 first = static_cast<i64>(matrix) * rank + row % rank;
    factors[i] = m < windows.rows ? u[first * windows.rows + m] : 0.0f;
  }
  __syncthreads();
  const float scale = 1.0f / windows.num_shifts;
  S* const to = static_cast<S*>(y.data) + DeviceWindows::origin(box, y);
  for_voxels<W>(boxes, box, [&](const u32(&at)[3], const u32(&voxel)[3]) {
    float sum[max_rows][W] = {};
    for (u32 copy = 0; copy < windows.num_shifts; ++copy) {
      u32 column;
      const u32 number = boxes.number(copy, met.begin[copy], at, column);
      const float* from = v + static_cast<i64>(met.matrix[number]) * rank * windows.columns + column;
      for (int r = 0; r < rank; ++r, from += windows.columns) {
        float v_at[W], u_at[max_rows];
        read(from, v_at);
        read(factors + (number * rank + r) * max_rows, u_at);
        FK_UNROLL
        for (int m = 0; m < max_rows; ++m) {
          FK_UNROLL
          for (int c = 0; c < W; ++c) sum[m][c] += u_at[m] * v_at[c];
        }
      }
    }
    S* const row = to + DeviceWindows::offset(voxel, y);
    FK_UNROLL
    for (int m = 0; m < max_rows; ++m) {
      if (m >= windows.rows) continue;
      FK_UNROLL
      for (int c = 0; c < W; ++c) sum[m][c] *= scale;
      write(row + m * y.stride[1], sum[m]);
    }
  });
}

// What W voxels need of a copy. It is read while the copy before has its turn.
template <int W>
struct OfCopy {
  u32 number;  // of the window
  float dv[W], v0[W];
};

template <int W, class S>
__global__ void __launch_bounds__(most_threads)
    gradients_kernel(const Boxes boxes, const Map x, const Factor v0, const Coefficients* const coefficients,
                     const float* const dv, const Map dx) {
  constexpr u32 quads = sizeof(Coefficients) / sizeof(Quad);
  __shared__ Met met;
  __shared__ Coefficients of_met[max_met];
  const DeviceWindows& windows = boxes.windows;
  const Window box = boxes.cut.window(windows.num_shifts, blockIdx.x);
  met.find(boxes, box);
  // Several at a time, so that their reads are under way together.
  constexpr u32 together = 4;
  for (u32 first = threadIdx.x; first < boxes.num_met() * quads; first += together * blockDim.x) {
    int matrix[together];
    Quad quad[together];
    FK_UNROLL
    for (u32 t = 0; t < together; ++t) {
      const u32 i = first + t * blockDim.x;
      matrix[t] = i < boxes.num_met() * quads ? met.matrix[i / quads] : -1;
      if (matrix[t] >= 0) quad[t] = reinterpret_cast<const Quad*>(coefficients + matrix[t])[i % quads];
    }
    FK_UNROLL
    for (u32 t = 0; t < together; ++t) {
      if (matrix[t] >= 0) reinterpret_cast<Quad*>(of_met)[first + t * blockDim.x] = quad[t];
    }
  }
  __syncthreads();
  const S* const from = static_cast<const S*>(x.data) + DeviceWindows::origin(box, x);
  S* const to = static_cast<S*>(dx.data) + DeviceWindows::origin(box, dx);
  for_voxels<W>(boxes, box, [&](const u32(&at)[3], const u32(&voxel)[3]) {
    const auto of_copy = [&](u32 copy) {
      OfCopy<W> of;
      u32 column;
      of.number = boxes.number(copy, met.begin[copy], at, column);
      const i64 matrix = met.matrix[of.number];
      read(dv + matrix * windows.columns + column, of.dv);
      read(of_matrix(v0, matrix) + column, of.v0);
      return of;
    };
    const S* row = from + DeviceWindows::offset(voxel, x);
    float values[max_rows][W] = {}, grad[max_rows][W] = {};
    FK_UNROLL
    for (int m = 0; m < max_rows; ++m) {
      if (m < windows.rows) read(row, values[m]);
      row += x.stride[1];
    }
    OfCopy<W> next = of_copy(0);
    relu_rows(values);
    for (u32 copy = 0; copy < windows.num_shifts; ++copy) {
      const OfCopy<W> now = next;
      if (copy + 1 < windows.num_shifts) next = of_copy(copy + 1);
      add_gradient(of_met[now.number], values, now.dv, now.v0, grad);
    }
    mask_rows(values, grad);
    S* row_out = to + DeviceWindows::offset(voxel, dx);
    FK_UNROLL
    for (int m = 0; m < max_rows; ++m) {
      if (m < windows.rows) write(row_out, grad[m]);
      row_out += dx.stride[1];
    }
  });
}

// Calls f with the voxels of a thread as a constant, a number of the map's dtype, and the boxes.
template <class F>
void with_boxes(const DeviceWindows& windows, DType dtype, F&& f) {
  with_dtype(dtype, [&](auto number) {
    const Boxes boxes(windows, sizeof(number), line);
    if (windows.wide) {
      f(std::integral_constant<int, chunk>{}, number, boxes);
    } else {
      f(std::integral_constant<int, 1>{}, number, boxes);
    }
  });
}

int threads_for(const Boxes& boxes, int width) {
  const int threads = round_up((boxes.cut.columns + width - 1) / width, 32);
  return threads < most_threads ? threads : most_threads;
}

}  // namespace

void gather_products(const Launcher& launch, const DeviceWindows& windows, i64 rank, const float* u,
                     const float* v, const Map& y) {
  with_boxes(windows, y.dtype, [&](auto width, auto number, const Boxes& boxes) {
    launch(products_kernel<width(), decltype(number)>, boxes.cut.per_shift, threads_for(boxes, width()),
           boxes, static_cast<int>(rank), u, v, y);
  });
}

void gather_gradients(const Launcher& launch, const DeviceWindows& windows, const Map& x, const Factor& v0,
                      const Coefficients* coefficients, const float* dv, const Map& dx) {
  with_boxes(windows, x.dtype, [&](auto width, auto number, const Boxes& boxes) {
    launch(gradients_kernel<width(), decltype(number)>, boxes.cut.per_shift, threads_for(boxes, width()),
           boxes, x, v0, coefficients, dv, dx);
  });
}

}  // namespace cuda
}  // namespace factorizer

// The factors, or the product, of every window: any solver, ranks 1 to 8.
#include "cuda/nmf/iterations.cuh"

namespace factorizer {
namespace cuda {
namespace {

template <int R>
__global__ void __launch_bounds__(32 * most_iterations_warps)
    forward_kernel(const DeviceWindows windows, const bool hals, const bool with_relu, const int iters,
                   const float eps, const Map x, const Factor u0, const Factor v0, const Map y,
                   float* const u_out, float* const v_out) {
  __shared__ Shared<R> shared;
  const Window window = windows.window_of_block(blockIdx.x);
  float tile[1][max_rows][chunk], v[chunk][R];
  load_numbers(windows, window, x, tile);
  if (with_relu) relu_rows(tile[0]);
  load_factor(windows, of_matrix(v0, window.matrix), v);
  if (first_warp()) shared.load_u(windows, of_matrix(u0, window.matrix));
  __syncthreads();
  for (int t = 0; t < iters; ++t) iterate(windows, hals, eps, tile[0], v, shared, [] {});

  if (v_out != nullptr) {
    store_factor(windows, v_out + window.matrix * R * windows.columns, v);
    if (first_warp() && lane() < windows.rows) {
      FK_UNROLL
      for (int r = 0; r < R; ++r) {
        u_out[(window.matrix * R + r) * windows.rows + lane()] = shared.u[lane()][r];
      }
    }
    return;
  }
  float product[max_rows][chunk] = {};
  FK_UNROLL
  for (int m = 0; m < max_rows; ++m) {
    FK_UNROLL
    for (int c = 0; c < chunk; ++c) {
      FK_UNROLL
      for (int r = 0; r < R; ++r) product[m][c] += shared.u[m][r] * v[c][r];
    }
  }
  store_chunk(windows, window, y, 0, product);
}

}  // namespace

void iterations_forward(const Launcher& launch, const DeviceWindows& windows, const NMFOptions& options,
                        const Map& x, const Factor& u0, const Factor& v0, const Map& y, float* u, float* v) {
  with_rank<1, max_rank>(options.rank, [&](auto rank) {
    launch(forward_kernel<rank()>, windows.num_shifts * windows.per_shift, iterations_threads(windows),
           windows, options.hals, options.relu, static_cast<int>(options.num_iters),
           static_cast<float>(options.eps), x, u0, v0, y, u, v);
  });
}

}  // namespace cuda
}  // namespace factorizer

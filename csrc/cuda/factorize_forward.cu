// The factors, or the product, of every window: any solver, ranks 1 to 8.
#include "factorize.cuh"

namespace factorizer {
namespace cuda {
namespace {

template <int R>
__global__ void __launch_bounds__(32 * most_factorize_warps)
    forward_kernel(const Cut cut, const bool hals, const bool with_relu, const int iters, const float eps,
                   const Map x, const Factor u0, const Factor v0, const Map y, float* const u_out,
                   float* const v_out) {
  __shared__ Shared<R> shared;
  const Window window = cut.window_of_block(blockIdx.x);
  float tile[1][max_rows][chunk], v[chunk][R];
  load_tile(cut, window, x, 0, tile);
  if (with_relu) relu_rows(tile[0]);
  load_factor(cut, of_matrix(v0, window.matrix), v);
  if (first_warp()) shared.load_u(cut, of_matrix(u0, window.matrix));
  __syncthreads();
  for (int t = 0; t < iters; ++t) iterate(cut, hals, eps, tile[0], v, shared, [] {});

  if (v_out != nullptr) {
    store_factor(cut, v_out + window.matrix * R * cut.columns, v);
    if (first_warp() && lane() < cut.rows) {
      FK_UNROLL
      for (int r = 0; r < R; ++r) {
        u_out[(window.matrix * R + r) * cut.rows + lane()] = shared.u[lane()][r];
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
  store_chunk(cut, window, y, 0, product);
}

}  // namespace

void factorize_forward(const Launcher& launch, const Cut& cut, const Options& options, const Map& x,
                       const Factor& u0, const Factor& v0, const Map& y, float* u, float* v) {
  with_rank<1, max_rank>(options.rank, [&](auto rank) {
    launch(forward_kernel<rank()>, cut.copies * cut.windows, factorize_threads(cut), cut, options.hals,
           options.relu, static_cast<int>(options.num_iters), static_cast<float>(options.eps), x, u0, v0, y,
           u, v);
  });
}

}  // namespace cuda
}  // namespace factorizer

// Rank 1 of HALS after a ReLU: one look at a window gives the sums that the iterations need, and an iteration
// costs 8 x 8 numbers. A window of 8 x 512 is held by one warp, 128 numbers in a lane, and four neighbours of
// the last axis share a block: where a row of one ends in the middle of a sector, the next has the rest.
#include "cuda/nmf/rank_one.cuh"

#include <type_traits>

#include "cuda/windows/tile.cuh"

namespace factorizer {
namespace cuda {
namespace {

// Of a window: one where a lane has four chunks, so its warp holds up to 512 columns.
template <int K>
constexpr int most_warps = K == 1 ? max_columns / chunk / 32 : 1;

// Windows of a block.
template <int K>
constexpr int together = most_warps<K> == 1 ? 4 : 1;

template <int K>
constexpr int most_threads = 32 * most_warps<K> * together<K>;

// The last u, w and e, for all the threads.
struct LastStep {
  float u[max_rows], w[max_rows], e;

  FK_DEVICE void publish(const Step& step) {
    if (lane() >= max_rows) return;
    u[lane()] = step.u;
    w[lane()] = step.w;
    if (lane() == 0) e = step.e;
  }
  // v = Xᵀw + e
  FK_DEVICE void v_of(const float (&x)[max_rows][chunk], float (&v)[chunk]) const {
    FK_UNROLL
    for (int c = 0; c < chunk; ++c) {
      v[c] = e;
      FK_UNROLL
      for (int m = 0; m < max_rows; ++m) v[c] += x[m][c] * w[m];
    }
  }
};

template <int K>
using MomentSums = Sums<Moments::count, most_warps<K>>;

// Reads a window, and takes the sums over its columns.
template <class S, int K>
FK_DEVICE void read_window(const DeviceWindows& windows, const Window& window, const Map& map,
                           const float* v0, float (&x)[K][max_rows][chunk], MomentSums<K>& sums) {
  float v[K][chunk];
  load_tile<S>(windows, window, map, 0, x);
  FK_UNROLL
  for (int k = 0; k < K; ++k) {
    load_row(windows, v0, k, v[k]);
    relu_rows(x[k]);
  }
  sums.take([&](int i) {
    constexpr int pairs = Moments::pairs;
    float sum = 0.0f;
    FK_UNROLL
    for (int k = 0; k < K; ++k) {
      FK_UNROLL
      for (int c = 0; c < chunk; ++c) {
        sum += i < pairs ? x[k][Symmetric<max_rows>::row(i)][c] * x[k][Symmetric<max_rows>::column(i)][c]
               : i < pairs + max_rows     ? x[k][i - pairs][c]
               : i < pairs + 2 * max_rows ? x[k][i - pairs - max_rows][c] * v[k][c]
                                          : v[k][c] * v[k][c];
      }
    }
    return sum;
  });
}

template <int K, class S>
__global__ void __launch_bounds__(most_threads<K>)
    forward_kernel(const DeviceWindows windows, const int iters, const float eps, const Map x,
                   const Factor v0, const Map y, float* const u_out, float* const v_out) {
  __shared__ MomentSums<K> sums_of[together<K>];
  __shared__ LastStep last_of[together<K>];
  if (K > 1 && !windows.wide)
    return;  // K > 1 is launched only with wide windows: the compiler may drop the narrow code
  Window window;
  if (!windows.window_of_row(blockIdx.x, together<K>, threadIdx.y, window)) return;
  auto& sums = sums_of[threadIdx.y];
  LastStep& last = last_of[threadIdx.y];
  float tile[K][max_rows][chunk];
  read_window<S>(windows, window, x, of_matrix(v0, window.matrix), tile, sums);
  if (first_warp()) {
    const Step step = solve_rank_one(windows.rows, windows.columns, iters, eps, Moments(sums.of[0]), nullptr);
    last.publish(step);
    if (u_out != nullptr && lane() < windows.rows) u_out[window.matrix * windows.rows + lane()] = step.u;
  }
  meet<most_warps<K>>();
  FK_UNROLL
  for (int k = 0; k < K; ++k) {
    float v[chunk], product[max_rows][chunk];
    last.v_of(tile[k], v);
    if (v_out != nullptr) {
      store_row(windows, v_out + window.matrix * windows.columns, k, v);
      continue;
    }
    FK_UNROLL
    for (int m = 0; m < max_rows; ++m) {
      FK_UNROLL
      for (int c = 0; c < chunk; ++c) product[m][c] = last.u[m] * v[c];
    }
    store_chunk<S>(windows, window, y, k, product);
  }
}

template <int K, class S>
__global__ void __launch_bounds__(most_threads<K>)
    backward_kernel(const DeviceWindows windows, const int iters, const int first, const float eps,
                    const Map x, const Map dy, const Factor v0, const Map dx,
                    Coefficients* const coefficients_out, float* const dv_out, float* const du0,
                    float* const dv0) {
  constexpr int count = 2 * max_rows + 1;
  struct Shared {
    MomentSums<K> moment_sums;
    Sums<count, most_warps<K>> loss_sums;
    LastStep last;
    Trace trace;
    Coefficients coefficients;
    float db;
  };
  __shared__ Shared shared[together<K>];
  if (K > 1 && !windows.wide)
    return;  // K > 1 is launched only with wide windows: the compiler may drop the narrow code
  Window window;
  if (!windows.window_of_row(blockIdx.x, together<K>, threadIdx.y, window)) return;
  auto& [moment_sums, loss_sums, last, trace, coefficients, db] = shared[threadIdx.y];
  const float* const v0_row = of_matrix(v0, window.matrix);
  float tile[K][max_rows][chunk];
  read_window<S>(windows, window, x, v0_row, tile, moment_sums);
  if (first_warp()) {
    last.publish(
        solve_rank_one(windows.rows, windows.columns, iters, eps, Moments(moment_sums.of[0]), &trace));
  }
  meet<most_warps<K>>();

  // dv = dYᵀu, then dY v, X dv and dvᵀv.
  const float scale = 1.0f / windows.num_shifts;
  float dv[K][chunk], partial[count] = {};
  FK_UNROLL
  for (int k = 0; k < K; ++k) {
    float v[chunk], loss[1][max_rows][chunk];
    load_tile<S>(windows, window, dy, k, loss);
    last.v_of(tile[k], v);
    FK_UNROLL
    for (int c = 0; c < chunk; ++c) {
      dv[k][c] = 0.0f;
      FK_UNROLL
      for (int m = 0; m < max_rows; ++m) {
        loss[0][m][c] *= scale;
        dv[k][c] += loss[0][m][c] * last.u[m];
        partial[m] += loss[0][m][c] * v[c];
      }
      FK_UNROLL
      for (int m = 0; m < max_rows; ++m) partial[max_rows + m] += tile[k][m][c] * dv[k][c];
      partial[2 * max_rows] += dv[k][c] * v[c];
    }
  }
  loss_sums.take([&](int i) { return partial[i]; });
  if (first_warp()) {
    const float* total = loss_sums.of[0];
    const int m = lane() % max_rows;
    const float of_b = differentiate_rank_one(iters, first, eps, Moments(moment_sums.of[0]), trace, total[m],
                                              total[max_rows + m], total[2 * max_rows], coefficients);
    if (lane() == 0) db = of_b;
    // U is updated first: u0 has no part in the result.
    if (du0 != nullptr && lane() < windows.rows) du0[window.matrix * windows.rows + lane()] = 0.0f;
  }
  meet<most_warps<K>>();

  if (coefficients_out != nullptr) {
    const float* from = &coefficients.s[0][0];
    float* to = &coefficients_out[window.matrix].s[0][0];
    for (u32 i = threadIdx.x; i < sizeof(Coefficients) / sizeof(float); i += blockDim.x) to[i] = from[i];
  }
  FK_UNROLL
  for (int k = 0; k < K; ++k) {
    float v[chunk], grad_v0[chunk], grad[max_rows][chunk] = {};
    load_row(windows, v0_row, k, v);
    if (dv0 != nullptr) {
      FK_UNROLL
      for (int c = 0; c < chunk; ++c) {
        grad_v0[c] = 2.0f * db * v[c];
        FK_UNROLL
        for (int m = 0; m < max_rows; ++m) grad_v0[c] += tile[k][m][c] * coefficients.da[m];
      }
      store_row(windows, dv0 + window.matrix * windows.columns, k, grad_v0);
    }
    if (coefficients_out != nullptr) {
      store_row(windows, dv_out + window.matrix * windows.columns, k, dv[k]);
      continue;
    }
    add_gradient(coefficients, tile[k], dv[k], v, grad);
    mask_rows(tile[k], grad);
    store_chunk<S>(windows, window, dx, k, grad);
  }
}

// Calls f with the chunks of a thread as a constant, a number of the map's dtype, and the numbers of blocks
// and of their threads. Four chunks where one warp then holds the window.
template <class F>
void with_chunks(const DeviceWindows& windows, DType dtype, F&& f) {
  with_dtype(dtype, [&](auto number) {
    const auto call = [&](auto chunks) {
      constexpr int K = chunks(), rows = together<K>;
      const dim3 threads(round_up((windows.columns + chunk * K - 1) / (chunk * K), 32), rows);
      f(chunks, number, windows.num_shifts * ((windows.per_shift + rows - 1) / rows), threads);
    };
    if (windows.wide && windows.columns > 256 && windows.columns <= 512) {
      call(std::integral_constant<int, 4>{});
    } else {
      call(std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace

void rank_one_forward(const Launcher& launch, const DeviceWindows& windows, const NMFOptions& options,
                      const Map& x, const Factor& v0, const Map& y, float* u, float* v) {
  with_chunks(windows, x.dtype, [&](auto chunks, auto number, i64 blocks, dim3 threads) {
    launch(forward_kernel<chunks(), decltype(number)>, blocks, threads, windows,
           static_cast<int>(options.num_iters), static_cast<float>(options.eps), x, v0, y, u, v);
  });
}

void rank_one_backward(const Launcher& launch, const DeviceWindows& windows, const NMFOptions& options,
                       const Map& x, const Map& dy, const Factor& v0, const Map& dx,
                       Coefficients* coefficients, float* dv, float* du0, float* dv0) {
  with_chunks(windows, x.dtype, [&](auto chunks, auto number, i64 blocks, dim3 threads) {
    launch(backward_kernel<chunks(), decltype(number)>, blocks, threads, windows,
           static_cast<int>(options.num_iters), static_cast<int>(options.num_iters - options.grad_steps),
           static_cast<float>(options.eps), x, dy, v0, dx, coefficients, dv, du0, dv0);
  });
}

}  // namespace cuda
}  // namespace factorizer

// Rank 1 of HALS after a ReLU: one look at a window gives the sums that the iterations need, and an iteration
// costs 8 x 8 numbers. A window of 8 x 512 is held by one warp, 128 numbers in a lane, and four neighbours of
// the last axis share a block: where a row of one ends in the middle of a sector, the next has the rest.
#include "cuda/nmf/rank_one.cuh"

#include <type_traits>

#include "cuda/common/gram.cuh"
#include "cuda/windows/tile.cuh"

namespace factorizer {
namespace cuda {
namespace {

// Of a window: one where a lane has four chunks, so its warp holds up to 512 columns.
template <int K>
constexpr int most_warps = K == 1 ? max_columns / chunk / 32 : 1;

// Windows of a block of each kernel: as many as its shared memory holds (48 KB without asking for more).
template <int K, class S>
constexpr int forward_windows = K == 1           ? 1
                                : sizeof(S) == 2 ? 4
                                                 : 2;
template <int K>
constexpr int backward_windows = K == 1 ? 1 : 2;

template <int K>
constexpr int threads_of(int windows) {
  return 32 * most_warps<K> * windows;
}

// Blocks of the backward on a multiprocessor, which bound a thread's registers: as many warps as shared
// memory holds, of half types 16, or 12 where dv stays in registers. 0: as the compiler likes.
template <int K, class S, bool ALONE>
constexpr int backward_blocks = K == 1           ? 0
                                : sizeof(S) == 4 ? 10 / backward_windows<K>
                                : ALONE          ? 12 / backward_windows<K>
                                                 : 16 / backward_windows<K>;

// Where a window's numbers are kept. Four chunks in registers would leave room for eight warps, which do not
// hide one another's loads.
template <int K, class S, int WINDOWS>
using Tile = std::conditional_t<K == 1, Held<S, K>, Staged<S, K, WINDOWS>>;

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
using MomentSums = Sums<Moments::places, most_warps<K>>;

// The sums over the columns of rows in shared memory, and of their products by pairs.
template <class S, int K, int WINDOWS>
FK_DEVICE void take_pairs(const Staged<S, K, WINDOWS>& tile, MomentSums<K>& sums) {
  constexpr u32 ones = std::is_same_v<S, bfloat16> ? 0x3f803f80u : 0x3c003c00u;
  constexpr int chains = 4, columns = 32;  // sums that do not wait for one another; columns of a reading
  float sum[chains][4] = {};
  const int g = lane() / 4, t = lane() % 4;
  const u32 of_ones = g == 0 ? ones : 0;  // row 8 of A
  FK_UNROLL
  for (int k = 0; k < K; ++k) {
    FK_UNROLL
    for (int n = 0; n < chunk * 32; n += columns) {
      u32 x[4];
      read_matrices(reinterpret_cast<const S*>(&tile.at[k][lane() % 8]) + n + lane() / 8 * 8, x);
      FK_UNROLL
      for (int half = 0; half < 2; ++half) {
        const u32 a[4] = {x[2 * half], of_ones, x[2 * half + 1], of_ones},
                  b[2] = {x[2 * half], x[2 * half + 1]};
        multiply_add<S>(a, b, sum[(n / columns * 2 + half) % chains]);
      }
    }
  }
  float total[4];
  FK_UNROLL
  for (int i = 0; i < 4; ++i) total[i] = (sum[0][i] + sum[1][i]) + (sum[2][i] + sum[3][i]);
  const float of_g[2] = {total[0], total[1]}, of_r[2] = {total[2], total[3]};
  write(sums.of_warp() + g * max_rows + 2 * t, of_g);
  if (g == 0) write(sums.of_warp() + Moments::of_r + 2 * t, of_r);
}

// Reads a window, and takes the sums over its columns.
template <class S, int K, class T>
FK_DEVICE void read_window(const DeviceWindows& windows, const Window& window, const Map& map,
                           const float* v0, T& tile, MomentSums<K>& sums) {
  constexpr bool by_tensor_cores = K > 1 && sizeof(S) == 2;
  constexpr int pairs = Moments::pairs;
  float sum[Moments::count] = {};
  tile.load(windows, window, map);
  FK_UNROLL
  for (int k = 0; k < K; ++k) {
    float v[chunk], x[max_rows][chunk];
    load_row(windows, v0, k, v);
    FK_UNROLL
    for (int m = 0; m < max_rows; ++m) {
      auto words = tile.get(k, m);
      words.relu();
      tile.set(k, m, words);
      FK_UNROLL
      for (int c = 0; c < chunk; ++c) x[m][c] = words.number(c);
    }
    FK_UNROLL
    for (int i = by_tensor_cores ? pairs + max_rows : 0; i < Moments::count; ++i) {
      FK_UNROLL
      for (int c = 0; c < chunk; ++c) {
        sum[i] += i < pairs ? x[Symmetric<max_rows>::row(i)][c] * x[Symmetric<max_rows>::column(i)][c]
                  : i < pairs + max_rows     ? x[i - pairs][c]
                  : i < pairs + 2 * max_rows ? x[i - pairs - max_rows][c] * v[c]
                                             : v[c] * v[c];
      }
    }
  }
  if constexpr (by_tensor_cores) {
    __syncwarp();
    take_pairs(tile, sums);
  }
  constexpr int first = by_tensor_cores ? pairs + max_rows : 0;
  sums.template take_from<first, Moments::count>([&](int i) { return sum[i]; }, Moments::put);
  sums.finish();
}

template <int K, class S>
__global__ void __launch_bounds__(threads_of<K>(forward_windows<K, S>))
    forward_kernel(const DeviceWindows windows, const int iters, const float eps, const Map x,
                   const Factor v0, const Map y, float* const u_out, float* const v_out) {
  constexpr int rows = forward_windows<K, S>;
  alignas(16) __shared__ MomentSums<K> sums_of[rows];
  __shared__ LastStep last_of[rows];
  if (K > 1 && !windows.wide)
    return;  // K > 1 is launched only with wide windows: the compiler may drop the narrow code
  Window window;
  if (!windows.window_of_row(blockIdx.x, rows, threadIdx.y, window)) return;
  auto& sums = sums_of[threadIdx.y];
  LastStep& last = last_of[threadIdx.y];
  Tile<K, S, rows> tile;
  read_window<S, K>(windows, window, x, of_matrix(v0, window.matrix), tile, sums);
  if (first_warp()) {
    const Step step = solve_rank_one(windows.rows, windows.columns, iters, eps, Moments(sums.of[0]), nullptr);
    last.publish(step);
    if (u_out != nullptr && lane() < windows.rows) u_out[window.matrix * windows.rows + lane()] = step.u;
  }
  meet<most_warps<K>>();
  FK_UNROLL
  for (int k = 0; k < K; ++k) {
    float values[max_rows][chunk], v[chunk], product[max_rows][chunk];
    numbers_of(tile, k, values);
    last.v_of(values, v);
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

// What the backward writes; du0 and dv0 where they are wanted.
struct Gradients {
  Map dx;                      // of a copy that is alone
  Coefficients* coefficients;  // of one of several, and dv
  float *dv, *du0, *dv0;
};

template <bool ALONE, int K, class S>
FK_DEVICE void differentiate_window(const DeviceWindows& windows, int iters, int first, float eps,
                                    const Map& x, const Map& dy, const Factor& v0, const Gradients& out) {
  constexpr int rows = backward_windows<K>;
  struct alignas(16) Shared {
    MomentSums<K> moment_sums;
    Sums<2 * max_rows + 1, most_warps<K>> loss_sums;
    LastStep last;
    Trace trace;
    Coefficients coefficients;
    float db;
  };
  __shared__ Shared shared[rows];
  if (K > 1 && !windows.wide)
    return;  // K > 1 is launched only with wide windows: the compiler may drop the narrow code
  Window window;
  if (!windows.window_of_row(blockIdx.x, rows, threadIdx.y, window)) return;
  auto& [moment_sums, loss_sums, last, trace, coefficients, db] = shared[threadIdx.y];
  const float* const v0_row = of_matrix(v0, window.matrix);
  Tile<K, S, rows> tile;
  read_window<S, K>(windows, window, x, v0_row, tile, moment_sums);
  if (first_warp()) {
    last.publish(
        solve_rank_one(windows.rows, windows.columns, iters, eps, Moments(moment_sums.of[0]), &trace));
  }
  meet<most_warps<K>>();

  // dv = dYᵀu, then dY v, X dv and dvᵀv.
  const float scale = 1.0f / windows.num_shifts;
  float dv[ALONE ? K : 1][chunk], partial[2 * max_rows] = {}, dv_v = 0.0f;
  FK_UNROLL
  for (int k = 0; k < K; ++k) {
    Held<S, 1> of_dy;
    of_dy.load(windows, window, dy, k);
    float (&of_k)[chunk] = dv[ALONE ? k : 0];
    __syncwarp();  // else the compiler reads x for the next chunks too, and has no room
    FK_UNROLL
    for (int c = 0; c < chunk; ++c) {  // column by column: few numbers live in registers together
      float x_c[max_rows], dy_c[max_rows], v = last.e, sum = 0.0f;
      FK_UNROLL
      for (int m = 0; m < max_rows; ++m) {
        x_c[m] = tile.get(k, m).number(c);
        dy_c[m] = of_dy.get(0, m).number(c);
        v += x_c[m] * last.w[m];
        sum += dy_c[m] * last.u[m];
      }
      sum *= scale;
      FK_UNROLL
      for (int m = 0; m < max_rows; ++m) {
        partial[m] += dy_c[m] * v;
        partial[max_rows + m] += x_c[m] * sum;
      }
      dv_v += sum * v;
      of_k[c] = sum;
    }
    if (!ALONE) store_row(windows, out.dv + window.matrix * windows.columns, k, of_k);
  }
  FK_UNROLL
  for (int m = 0; m < max_rows; ++m) partial[m] *= scale;
  dv_v = over_warp(dv_v);
  if (lane() == 0) loss_sums.of_warp()[2 * max_rows] = dv_v;
  loss_sums.template take_from<0, 2 * max_rows>([&](int i) { return partial[i]; }, loss_sums.in_order);
  loss_sums.finish();
  if (first_warp()) {
    const float* total = loss_sums.of[0];
    const int m = lane() % max_rows;
    const float of_b = differentiate_rank_one(iters, first, eps, Moments(moment_sums.of[0]), trace, total[m],
                                              total[max_rows + m], total[2 * max_rows], coefficients);
    if (lane() == 0) db = of_b;
    // U is updated first: u0 has no part in the result.
    if (out.du0 != nullptr && lane() < windows.rows) out.du0[window.matrix * windows.rows + lane()] = 0.0f;
  }
  meet<most_warps<K>>();

  if (!ALONE) {
    const float* from = &coefficients.s[0][0];
    float* to = &out.coefficients[window.matrix].s[0][0];
    for (u32 i = threadIdx.x; i < sizeof(Coefficients) / sizeof(float); i += blockDim.x) to[i] = from[i];
    if (out.dv0 == nullptr) return;
  }
  FK_UNROLL
  for (int k = 0; k < K; ++k) {
    __syncwarp();  // as above, of the coefficients
    float values[max_rows][chunk], v[chunk];
    numbers_of(tile, k, values);
    load_row(windows, v0_row, k, v);
    if (out.dv0 != nullptr) {
      float grad_v0[chunk];
      FK_UNROLL
      for (int c = 0; c < chunk; ++c) {
        grad_v0[c] = 2.0f * db * v[c];
        FK_UNROLL
        for (int m = 0; m < max_rows; ++m) grad_v0[c] += values[m][c] * coefficients.da[m];
      }
      store_row(windows, out.dv0 + window.matrix * windows.columns, k, grad_v0);
    }
    if constexpr (ALONE) {
      float grad[max_rows][chunk] = {};
      add_gradient(coefficients, values, dv[k], v, grad);
      mask_rows(values, grad);
      store_chunk<S>(windows, window, out.dx, k, grad);
    }
  }
}

// The windows of a copy that is alone: dx.
template <int K, class S>
__global__ void __launch_bounds__(threads_of<K>(backward_windows<K>), backward_blocks<K, S, true>)
    backward_kernel(const DeviceWindows windows, const int iters, const int first, const float eps,
                    const Map x, const Map dy, const Factor v0, const Gradients out) {
  differentiate_window<true, K, S>(windows, iters, first, eps, x, dy, v0, out);
}

// The windows of several copies: what dx is gathered from.
template <int K, class S>
__global__ void __launch_bounds__(threads_of<K>(backward_windows<K>), backward_blocks<K, S, false>)
    coefficients_kernel(const DeviceWindows windows, const int iters, const int first, const float eps,
                        const Map x, const Map dy, const Factor v0, const Gradients out) {
  differentiate_window<false, K, S>(windows, iters, first, eps, x, dy, v0, out);
}

// Calls f with the chunks of a thread as a constant, and a number of the map's dtype. Four chunks where one
// warp then holds the window.
template <class F>
void with_chunks(const DeviceWindows& windows, DType dtype, F&& f) {
  with_dtype(dtype, [&](auto number) {
    if (windows.wide && windows.columns > 256 && windows.columns <= 512) {
      f(std::integral_constant<int, 4>{}, number);
    } else {
      f(std::integral_constant<int, 1>{}, number);
    }
  });
}

i64 blocks_of(const DeviceWindows& windows, int rows) {
  return windows.num_shifts * ((windows.per_shift + rows - 1) / rows);
}

dim3 threads_of(const DeviceWindows& windows, int chunks, int rows) {
  return dim3(round_up((windows.columns + chunk * chunks - 1) / (chunk * chunks), 32), rows);
}

}  // namespace

void rank_one_forward(const Launcher& launch, const DeviceWindows& windows, const NMFOptions& options,
                      const Map& x, const Factor& v0, const Map& y, float* u, float* v) {
  with_chunks(windows, x.dtype, [&](auto chunks, auto number) {
    using S = decltype(number);
    constexpr int rows = forward_windows<chunks(), S>;
    launch(forward_kernel<chunks(), S>, blocks_of(windows, rows), threads_of(windows, chunks(), rows),
           windows, static_cast<int>(options.num_iters), static_cast<float>(options.eps), x, v0, y, u, v);
  });
}

void rank_one_backward(const Launcher& launch, const DeviceWindows& windows, const NMFOptions& options,
                       const Map& x, const Map& dy, const Factor& v0, const Map& dx,
                       Coefficients* coefficients, float* dv, float* du0, float* dv0) {
  with_chunks(windows, x.dtype, [&](auto chunks, auto number) {
    constexpr int rows = backward_windows<chunks()>;
    const auto kernel = coefficients == nullptr ? backward_kernel<chunks(), decltype(number)>
                                                : coefficients_kernel<chunks(), decltype(number)>;
    launch(kernel, blocks_of(windows, rows), threads_of(windows, chunks(), rows), windows,
           static_cast<int>(options.num_iters), static_cast<int>(options.num_iters - options.grad_steps),
           static_cast<float>(options.eps), x, dy, v0, Gradients{dx, coefficients, dv, du0, dv0});
  });
}

}  // namespace cuda
}  // namespace factorizer

// The backward of iterations_forward.cu: the iterations again, kept on a tape, and then in reverse. Two files
// compile it, for ranks 1 to 4 and 5 to 8, side by side.
//
// A block has its own piece of tape and goes through the windows of one copy with it, so that the tape stays
// in the L2 cache. A thread reads from it only what it wrote itself.
#pragma once

#include "cuda/nmf/iterations.cuh"

namespace factorizer {
namespace cuda {
namespace {

// Of one iteration: V before it, four columns of a row for each thread; then U before it, A and B.
template <int R>
struct Tape {
  float* base;

  FK_DEVICE float* v(int step, int r) const {
    return base + step * tape_size(R, blockDim.x) + chunk * (r * blockDim.x + threadIdx.x);
  }
  FK_DEVICE float* u(int step) const { return v(step, R) - chunk * threadIdx.x; }
  FK_DEVICE float* a(int step) const { return u(step) + max_rows * R; }
  FK_DEVICE float* b(int step) const { return a(step) + max_rows * R; }

  FK_DEVICE void keep_v(int step, const float (&from)[chunk][R]) const {
    FK_UNROLL
    for (int r = 0; r < R; ++r) write(v(step, r), {from[0][r], from[1][r], from[2][r], from[3][r]});
  }
  FK_DEVICE void load_v(int step, float (&to)[chunk][R]) const {
    FK_UNROLL
    for (int r = 0; r < R; ++r) {
      float row[chunk];
      read(v(step, r), row);
      FK_UNROLL
      for (int c = 0; c < chunk; ++c) to[c][r] = row[c];
    }
  }
  // The first warp alone.
  FK_DEVICE void keep_rows(int step, const Shared<R>& shared) const {
    for (int p = lane(); p < R * R; p += 32) b(step)[p] = shared.gram[p];
    const int m = lane();
    if (m >= max_rows) return;
    FK_UNROLL
    for (int r = 0; r < R; ++r) {
      u(step)[m * R + r] = shared.u[m][r];
      a(step)[m * R + r] = shared.sums.of[0][m * R + r];
    }
  }
};

// What the reverse iterations share beside the forward's.
template <int R>
struct SharedGradient {
  float du[max_rows][R], da[max_rows][R], dq[max_rows][R], old_u[max_rows][R];
  float both_b[R * R];  // dB + dBᵀ
};

// The U step in reverse, by the first warp: from du of the new U, and the sums of the V step's gradient, to
// du of the old one, da and dB + dBᵀ. Leaves the old U and its Gram matrix in shared.
template <int R>
FK_DEVICE void reverse_u(bool hals, float eps, const Tape<R>& tape, int step, Shared<R>& shared,
                         SharedGradient<R>& gradient) {
  float (&both_d)[R * R] = gradient.both_b;  // until dB is known
  shared.gram_from_sums(both_d);
  for (int p = lane(); p < R * R; p += 32) shared.gram[p] = tape.b(step)[p];
  __syncwarp();
  if (lane() < max_rows) {
    const int m = lane();
    float f[R], f_new[R], a[R], du[R], da[R], dq[R] = {};
    FK_UNROLL
    for (int r = 0; r < R; ++r) {
      f[r] = tape.u(step)[m * R + r];
      a[r] = tape.a(step)[m * R + r];
      f_new[r] = shared.u[m][r];
      du[r] = gradient.du[m][r] + shared.sums.of[0][m * R + r];
      FK_UNROLL
      for (int j = 0; j < R; ++j) du[r] += both_d[r * R + j] * shared.u[m][j];
    }
    update_backward(hals, eps, shared.gram, f, f_new, a, du, da, dq);
    FK_UNROLL
    for (int r = 0; r < R; ++r) {
      gradient.old_u[m][r] = f[r];
      gradient.du[m][r] = du[r];
      gradient.da[m][r] = da[r];
      gradient.dq[m][r] = dq[r];
    }
  }
  __syncwarp();
  for (int p = lane(); p < R * R; p += 32) {
    float sum = 0.0f;
    FK_UNROLL
    for (int m = 0; m < max_rows; ++m) {
      sum +=
          gram_gradient(hals, p / R, p % R, gradient.old_u[m], shared.u[m], gradient.da[m], gradient.dq[m]);
    }
    gradient.both_b[p] = sum;
  }
  __syncwarp();
  if (lane() < max_rows) {
    FK_UNROLL
    for (int r = 0; r < R; ++r) shared.u[lane()][r] = gradient.old_u[lane()][r];
  }
  __syncwarp();
  shared.gram_of_u();
}

// One iteration in reverse: dv becomes the gradient of the V before it, dx gets its share.
template <int R>
FK_DEVICE void reverse(bool hals, float eps, const float (&x)[max_rows][chunk], const Tape<R>& tape, int step,
                       float (&v)[chunk][R], float (&dv)[chunk][R], float (&dx)[max_rows][chunk],
                       Shared<R>& shared, SharedGradient<R>& gradient) {
  using Pairs = Symmetric<R>;
  constexpr int projections = Shared<R>::projections;
  float old_v[chunk][R], dc[chunk][R], dq[chunk][R] = {};
  tape.load_v(step, old_v);
  FK_UNROLL
  for (int c = 0; c < chunk; ++c) {
    float projection[R];
    project(x, c, shared.u, projection);
    update_backward(hals, eps, shared.gram, old_v[c], v[c], projection, dv[c], dc[c], dq[c]);
    FK_UNROLL
    for (int m = 0; m < max_rows; ++m) {
      FK_UNROLL
      for (int r = 0; r < R; ++r) dx[m][c] += shared.u[m][r] * dc[c][r];
    }
  }
  shared.sums.take([&](int i) {
    float sum = 0.0f;
    FK_UNROLL
    for (int c = 0; c < chunk; ++c) {
      sum += i < projections ? x[i / R][c] * dc[c][i % R]
                             : gram_gradient(hals, Pairs::row(i - projections),
                                             Pairs::column(i - projections), old_v[c], v[c], dc[c], dq[c]);
    }
    return sum;
  });
  if (first_warp()) reverse_u(hals, eps, tape, step, shared, gradient);
  __syncthreads();
  FK_UNROLL
  for (int c = 0; c < chunk; ++c) {
    float projection[R];
    project(x, c, gradient.da, projection);
    FK_UNROLL
    for (int r = 0; r < R; ++r) {
      dv[c][r] += projection[r];
      FK_UNROLL
      for (int j = 0; j < R; ++j) dv[c][r] += gradient.both_b[r * R + j] * old_v[c][j];
      FK_UNROLL
      for (int m = 0; m < max_rows; ++m) dx[m][c] += gradient.da[m][r] * old_v[c][r];
    }
    FK_UNROLL
    for (int r = 0; r < R; ++r) v[c][r] = old_v[c][r];
  }
}

template <int R>
__global__ void __launch_bounds__(32 * most_iterations_warps)
    backward_kernel(const DeviceWindows windows, const u32 copy, const bool hals, const bool with_relu,
                    const int iters, const int first, const float eps, const Map x, const Factor u0,
                    const Factor v0, const Map dy, const float* const du, const float* const dv, const Map dx,
                    float* const du0, float* const dv0, float* const tapes) {
  __shared__ Shared<R> shared;
  __shared__ SharedGradient<R> gradient;
  const Tape<R> tape{tapes + blockIdx.x * (iters - first) * tape_size(R, blockDim.x)};
  const float scale = 1.0f / windows.num_shifts;
  for (u32 index = blockIdx.x; index < windows.per_shift; index += gridDim.x) {
    const Window window = windows.window(copy, index);
    float tile[1][max_rows][chunk], grad[1][max_rows][chunk], v[chunk][R], grad_v[chunk][R];
    load_numbers(windows, window, x, tile);
    if (with_relu) relu_rows(tile[0]);
    load_factor(windows, of_matrix(v0, window.matrix), v);
    if (first_warp()) shared.load_u(windows, of_matrix(u0, window.matrix));
    __syncthreads();
    for (int t = 0; t < iters; ++t) {
      if (t >= first) tape.keep_v(t - first, v);
      iterate(windows, hals, eps, tile[0], v, shared, [&] {
        if (t >= first) tape.keep_rows(t - first, shared);
      });
    }

    if (dv == nullptr) {
      load_numbers(windows, window, dy, grad);
      FK_UNROLL
      for (int m = 0; m < max_rows; ++m) {
        FK_UNROLL
        for (int c = 0; c < chunk; ++c) grad[0][m][c] *= scale;
      }
      FK_UNROLL
      for (int c = 0; c < chunk; ++c) project(grad[0], c, shared.u, grad_v[c]);
      shared.sums.template take<Shared<R>::projections>([&](int i) {
        float sum = 0.0f;
        FK_UNROLL
        for (int c = 0; c < chunk; ++c) sum += grad[0][i / R][c] * v[c][i % R];
        return sum;
      });
    } else {
      load_factor(windows, dv + window.matrix * R * windows.columns, grad_v);
    }
    if (threadIdx.x < max_rows) {
      const int m = lane();
      FK_UNROLL
      for (int r = 0; r < R; ++r) {
        gradient.du[m][r] = dv == nullptr      ? shared.sums.of[0][m * R + r]
                            : m < windows.rows ? du[(window.matrix * R + r) * windows.rows + m]
                                               : 0.0f;
      }
    }
    __syncthreads();

    FK_UNROLL
    for (int m = 0; m < max_rows; ++m) {
      FK_UNROLL
      for (int c = 0; c < chunk; ++c) grad[0][m][c] = 0.0f;
    }
    for (int t = iters - 1; t >= first; --t) {
      reverse(hals, eps, tile[0], tape, t - first, v, grad_v, grad[0], shared, gradient);
    }

    if (with_relu) mask_rows(tile[0], grad[0]);
    if (copy > 0) {
      load_numbers(windows, window, dx, tile);
      FK_UNROLL
      for (int m = 0; m < max_rows; ++m) {
        FK_UNROLL
        for (int c = 0; c < chunk; ++c) grad[0][m][c] += tile[0][m][c];
      }
    }
    store_chunk(windows, window, dx, 0, grad[0]);
    if (du0 != nullptr) {
      store_factor(windows, dv0 + window.matrix * R * windows.columns, grad_v);
      if (first_warp() && lane() < windows.rows) {
        FK_UNROLL
        for (int r = 0; r < R; ++r) {
          du0[(window.matrix * R + r) * windows.rows + lane()] = gradient.du[lane()][r];
        }
      }
    }
    __syncthreads();  // the next window's U takes this one's place
  }
}

}  // namespace

template <int FIRST>
void iterations_backward(const Launcher& launch, const DeviceWindows& windows, const NMFOptions& options,
                         u32 copy, i64 programs, const Map& x, const Factor& u0, const Factor& v0,
                         const Map& dy, const float* du, const float* dv, const Map& dx, float* du0,
                         float* dv0, float* tape) {
  with_rank<FIRST, FIRST + 3>(options.rank, [&](auto rank) {
    launch(backward_kernel<rank()>, programs, iterations_threads(windows), windows, copy, options.hals,
           options.relu, static_cast<int>(options.num_iters),
           static_cast<int>(options.num_iters - options.grad_steps), static_cast<float>(options.eps), x, u0,
           v0, dy, du, dv, dx, du0, dv0, tape);
  });
}

}  // namespace cuda
}  // namespace factorizer

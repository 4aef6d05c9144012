// The native core without Python: against a naive loop in value, against finite differences in gradient, on
// odd shapes, shifts and thread counts. Meant to be run under the sanitizers too.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/common/dispatch.h"
#include "problems/nmf.h"

namespace fk = factorizer;
using fk::i64;
using Numbers = std::vector<double>;

namespace {

struct Case {
  i64 batch, heads, head_dim;
  i64 size[3], patch[3];
  std::vector<i64> shifts;
  i64 rank, num_iters, grad_steps;
  bool hals, relu;
};

fk::Windows windows_of(const Case& c) {
  fk::Windows w{};
  w.batch = c.batch;
  w.heads = c.heads;
  w.head_dim = c.head_dim;
  for (int axis = 0; axis < 3; ++axis) {
    w.size[axis] = c.size[axis];
    w.patch[axis] = c.patch[axis];
    w.grid[axis] = c.size[axis] / c.patch[axis];
  }
  w.num_shifts = static_cast<i64>(c.shifts.size()) / 3;
  w.shifts = c.shifts.data();
  return w;
}

fk::SwinNMF problem_of(const Case& c, const Numbers& x, const Numbers& u0, const Numbers& v0, int threads) {
  fk::SwinNMF p;
  p.dtype = fk::DType::float64;
  p.windows = windows_of(c);
  p.options = {c.rank, c.num_iters, c.grad_steps, c.hals, c.relu, 1e-16};
  p.threads = threads;
  const i64 voxels = p.windows.voxels(), channels = c.heads * c.head_dim;
  p.x = {const_cast<double*>(x.data()), {channels * voxels, voxels, c.size[1] * c.size[2], c.size[2], 1}};
  p.u0 = {const_cast<double*>(u0.data()), 0};
  p.v0 = {const_cast<double*>(v0.data()), 0};
  return p;
}

// One matrix, factors transposed (rank rows); the formulas as they stand in the reference.
void naive_nmf(const Case& c, const Numbers& x, i64 rows, i64 columns, Numbers u, Numbers v, Numbers& y) {
  auto update = [&](Numbers& f, i64 extent, const Numbers& other, i64 other_extent, auto x_at) {
    Numbers projection(c.rank * extent), gram(c.rank * c.rank);
    for (i64 r = 0; r < c.rank; ++r) {
      for (i64 i = 0; i < extent; ++i) {
        for (i64 j = 0; j < other_extent; ++j)
          projection[r * extent + i] += x_at(i, j) * other[r * other_extent + j];
      }
      for (i64 s = 0; s < c.rank; ++s) {
        for (i64 j = 0; j < other_extent; ++j) {
          gram[r * c.rank + s] += other[r * other_extent + j] * other[s * other_extent + j];
        }
      }
    }
    const Numbers old = f;
    for (i64 r = 0; r < c.rank; ++r) {
      for (i64 i = 0; i < extent; ++i) {
        double sum = 0;
        for (i64 j = 0; j < c.rank; ++j) {
          if (!c.hals || j != r) sum += (c.hals ? f : old)[j * extent + i] * gram[j * c.rank + r];
        }
        const double a = projection[r * extent + i];
        f[r * extent + i] = c.hals ? std::fmax(0.0, (a - sum + 1e-16) / (gram[r * c.rank + r] + 1e-16))
                                   : old[r * extent + i] * a / (sum + 1e-16);
      }
    }
  };
  for (i64 t = 0; t < c.num_iters; ++t) {
    update(u, rows, v, columns, [&](i64 m, i64 n) { return x[m * columns + n]; });
    update(v, columns, u, rows, [&](i64 n, i64 m) { return x[m * columns + n]; });
  }
  for (i64 m = 0; m < rows; ++m) {
    for (i64 n = 0; n < columns; ++n) {
      y[m * columns + n] = 0;
      for (i64 r = 0; r < c.rank; ++r) y[m * columns + n] += u[r * rows + m] * v[r * columns + n];
    }
  }
}

Numbers naive(const Case& c, const Numbers& x, const Numbers& u0, const Numbers& v0) {
  const fk::Windows w = windows_of(c);
  const i64 rows = w.head_dim, columns = w.columns();
  Numbers out(x.size()), matrix(rows * columns), y(rows * columns);
  std::vector<i64> place(rows * columns);
  for (i64 s = 0; s < w.num_shifts; ++s) {
    for (i64 bh = 0; bh < w.batch * w.heads; ++bh) {
      for (i64 g = 0; g < w.num_windows(); ++g) {
        const i64 grid[3] = {g / w.grid[2] / w.grid[1], g / w.grid[2] % w.grid[1], g % w.grid[2]};
        for (i64 m = 0; m < rows; ++m) {
          for (i64 n = 0; n < columns; ++n) {
            const i64 p[3] = {n / w.patch[2] / w.patch[1], n / w.patch[2] % w.patch[1], n % w.patch[2]};
            i64 at = bh * rows + m;
            for (int axis = 0; axis < 3; ++axis) {
              const i64 rolled = grid[axis] * w.patch[axis] + p[axis] - w.shifts[3 * s + axis];
              at = at * w.size[axis] + (rolled + w.size[axis]) % w.size[axis];
            }
            place[m * columns + n] = at;
            matrix[m * columns + n] = c.relu ? std::fmax(0.0, x[at]) : x[at];
          }
        }
        naive_nmf(c, matrix, rows, columns, u0, v0, y);
        for (i64 i = 0; i < rows * columns; ++i) out[place[i]] += y[i] / static_cast<double>(w.num_shifts);
      }
    }
  }
  return out;
}

int failures = 0;

void expect(bool condition, const char* what, double value) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s (%g)\n", what, value);
}

double distance(const Numbers& a, const Numbers& b) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return std::sqrt(difference / (norm > 0 ? norm : 1));
}

double dot(const Numbers& a, const Numbers& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

void check(const Case& c) {
  std::mt19937 random(7);
  std::uniform_real_distribution<double> uniform(0.1, 1.0);
  auto draw = [&](i64 count, bool signed_values) {
    Numbers numbers(count);
    for (double& n : numbers) n = uniform(random) * (signed_values && random() % 3 == 0 ? -1 : 1);
    return numbers;
  };
  const fk::Windows w = windows_of(c);
  const i64 count = w.batch * w.heads * w.head_dim * w.voxels();
  const Numbers x = draw(count, c.relu), dy = draw(count, true), direction = draw(count, true);
  const Numbers u0 = draw(c.rank * w.head_dim, false), v0 = draw(c.rank * w.columns(), false);
  const double nan = std::nan("");

  Numbers y(count, nan), dx(count, nan), du0(u0.size(), nan), dv0(v0.size(), nan), again(count, nan);
  for (int threads : {1, 3}) {
    fk::SwinNMF p = problem_of(c, x, u0, v0, threads);
    p.y = threads == 1 ? y.data() : again.data();
    fk::cpu_kernels().swin_nmf_forward(p);
  }
  expect(y == again, "the same bits for any number of threads", 0);
  expect(distance(y, naive(c, x, u0, v0)) < 1e-11, "forward against the naive loop",
         distance(y, naive(c, x, u0, v0)));

  fk::SwinNMF p = problem_of(c, x, u0, v0, 2);
  p.dy = p.x;
  p.dy.data = const_cast<double*>(dy.data());
  p.dx = dx.data();
  p.du0 = {du0.data(), 0};
  p.dv0 = {dv0.data(), 0};
  fk::cpu_kernels().swin_nmf_backward(p);
  if (c.grad_steps < c.num_iters) {
    for (double g : dx) expect(std::isfinite(g), "a finite gradient", g);
    return;
  }
  // The directional derivative along x and v0 at once.
  const double h = 1e-6;
  const Numbers v_direction = draw(static_cast<i64>(v0.size()), true);
  Numbers losses;
  for (double sign : {1.0, -1.0}) {
    Numbers moved = x, moved_v = v0;
    for (i64 i = 0; i < count; ++i) moved[i] += sign * h * direction[i];
    for (std::size_t i = 0; i < v0.size(); ++i) moved_v[i] += sign * h * v_direction[i];
    losses.push_back(dot(naive(c, moved, u0, moved_v), dy));
  }
  const double expected = (losses[0] - losses[1]) / (2 * h);
  const double slope = dot(dx, direction) + dot(dv0, v_direction);
  expect(std::fabs(slope - expected) < 1e-5 * (1 + std::fabs(expected)), "backward against differences",
         slope - expected);
}

void check_matricize() {
  const Case c{2, 2, 3, {2, 6, 10}, {1, 3, 5}, {0, 0, 0, 1, 2, 7}, 1, 1, 1, true, false};
  const fk::Windows w = windows_of(c);
  const i64 count = 2 * 6 * w.voxels();
  Numbers x(count), back(count, std::nan("")), z(2 * count, std::nan(""));
  for (i64 i = 0; i < count; ++i) x[i] = static_cast<double>(i);
  const fk::Volume volume{x.data(), {6 * w.voxels(), w.voxels(), 60, 10, 1}};
  fk::cpu_kernels().sw_matricize({fk::DType::float64, w, 2, volume, z.data(), 1.0});
  fk::Volume out = volume;
  out.data = back.data();
  fk::cpu_kernels().sw_dematricize({fk::DType::float64, w, 2, out, z.data(), 0.5});
  expect(x == back, "dematricize inverts matricize", distance(back, x));
}

}  // namespace

int main() {
  for (bool hals : {true, false}) {
    check({1, 2, 3, {2, 4, 6}, {2, 2, 3}, {0, 0, 0, 1, 1, 2}, 1, 3, 3, hals, true});
    check({2, 1, 4, {1, 6, 10}, {1, 3, 5}, {0, 2, 9}, 2, 2, 2, hals, true});
    check({1, 1, 5, {1, 1, 37}, {1, 1, 37}, {0, 0, 0}, 1, 4, 4, hals, false});
    check({1, 1, 8, {8, 8, 16}, {8, 8, 8}, {0, 0, 0, 4, 4, 4}, 1, 5, 2, hals, true});
    check({1, 1, 2, {1, 1, 20011}, {1, 1, 20011}, {0, 0, 3}, 1, 2, 2, hals, true});
    check({1, 1, 2, {1, 130, 131}, {1, 130, 131}, {0, 5, 7}, 1, 2, 2, hals, false});
  }
  check({1, 1, 12, {1, 1, 40}, {1, 1, 40}, {0, 0, 0}, 9, 2, 2, false, false});
  check_matricize();
  std::printf("%s, %s\n", fk::cpu_kernels().isa, failures == 0 ? "passed" : "failed");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

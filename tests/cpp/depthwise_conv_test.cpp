// depthwise_conv without Python: against a naive loop in long double, in both precisions, on odd shapes and
// strides, with every number of threads the same bits. Meant to be run under the sanitizers too.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "cpu/common/dispatch.h"
#include "problems/depthwise.h"

namespace fk = factorizer;
using fk::i64;

namespace {

struct Case {
  i64 batch, channels, size[3], kernel[3];
};

int failures = 0;

void expect(bool condition, const char* what, const Case& c, double value) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s, %lld x %lld x (%lld, %lld, %lld) (%g)\n", what, (long long)c.batch,
              (long long)c.channels, (long long)c.size[0], (long long)c.size[1], (long long)c.size[2], value);
}

// The tensors of a problem: each in memory of just its size, where a sanitizer sees what goes beyond.
template <class T>
struct Tensors {
  std::vector<T> x, dy, weight, bias, y, dx, dweight, dbias;

  explicit Tensors(const Case& c) {
    std::mt19937 random(7);
    std::uniform_real_distribution<double> uniform(-1.0, 1.0);
    const i64 taps = c.kernel[0] * c.kernel[1] * c.kernel[2];
    const i64 elements = c.batch * c.channels * c.size[0] * c.size[1] * c.size[2];
    const T nan = std::numeric_limits<T>::quiet_NaN();
    for (auto* v : {&x, &dy}) v->resize(elements);
    for (auto* v : {&y, &dx}) v->assign(elements, nan);
    weight.resize(c.channels * taps);
    bias.resize(c.channels);
    dweight.assign(weight.size(), nan);
    dbias.assign(bias.size(), nan);
    for (auto* v : {&x, &dy, &weight, &bias}) {
      for (T& value : *v) value = T(uniform(random));
    }
  }

  fk::DepthwiseConv problem(const Case& c, int threads) {
    fk::DepthwiseConv p;
    p.dtype = sizeof(T) == 4 ? fk::DType::float32 : fk::DType::float64;
    p.batch = c.batch;
    p.channels = c.channels;
    for (int axis = 0; axis < 3; ++axis) {
      p.size[axis] = c.size[axis];
      p.kernel[axis] = c.kernel[axis];
    }
    p.threads = threads;
    p.x = {x.data(), {c.channels * p.voxels(), p.voxels(), c.size[1] * c.size[2], c.size[2], 1}};
    p.dy = p.x;
    p.dy.data = dy.data();
    p.weight = weight.data();
    return p;
  }

  void run(const Case& c, int threads) {
    fk::DepthwiseConv p = problem(c, threads);
    p.bias = bias.data();
    p.y = y.data();
    fk::cpu_kernels().depthwise_conv_forward(p);
    p.dx = dx.data();
    p.dweight = dweight.data();
    p.dbias = dbias.data();
    fk::cpu_kernels().depthwise_conv_backward(p);
  }
};

template <class T>
double largest_error(const std::vector<T>& ours, const std::vector<long double>& expected) {
  double largest = 0;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    const double difference = std::fabs(double(ours[i] - expected[i]));
    if (!(difference <= largest)) largest = difference;  // NaN too
  }
  return largest;
}

// How far a sum of `terms` random terms may be from the exact one, whatever the order of its additions. The
// terms' mean is zero and their deviation `deviation`, so the partial sum of k of them is about
// deviation sqrt(k) large. Adding a term rounds it by at most u times that, u half an epsilon, either way,
// and so does forming the term where it is a product: the errors' variances add up to no more than (u
// deviation)² (1 + 2 + .. + terms + terms). Six of the deviations that follow; of evenly distributed
// roundings, whose variance is a third of that, ten.
template <class T>
double rounding(i64 terms, double deviation) {
  const double u = std::numeric_limits<T>::epsilon() / 2, n = double(terms);
  return 6 * u * deviation * std::sqrt(n * (n + 1) / 2 + n);
}

template <class T>
void check(const Case& c) {
  Tensors<T> t(c);
  t.run(c, 1);

  const i64 *s = c.size, *k = c.kernel, taps = k[0] * k[1] * k[2], voxels = s[0] * s[1] * s[2];
  std::vector<long double> y(t.y.size()), dx(t.y.size()), dweight(t.weight.size()), dbias(t.bias.size());
  for (i64 map = 0; map < c.batch * c.channels; ++map) {
    const i64 channel = map % c.channels;
    for (i64 voxel = 0; voxel < voxels; ++voxel) {
      const i64 at = map * voxels + voxel, p[3] = {voxel / s[2] / s[1], voxel / s[2] % s[1], voxel % s[2]};
      y[at] += t.bias[channel];
      dbias[channel] += t.dy[at];
      for (i64 tap = 0; tap < taps; ++tap) {
        const i64 q[3] = {p[0] + tap / k[2] / k[1] - k[0] / 2, p[1] + tap / k[2] % k[1] - k[1] / 2,
                          p[2] + tap % k[2] - k[2] / 2};
        if (q[0] < 0 || q[0] >= s[0] || q[1] < 0 || q[1] >= s[1] || q[2] < 0 || q[2] >= s[2]) continue;
        const i64 from = map * voxels + (q[0] * s[1] + q[1]) * s[2] + q[2];
        y[at] += static_cast<long double>(t.weight[channel * taps + tap]) * t.x[from];
        dx[from] += static_cast<long double>(t.weight[channel * taps + tap]) * t.dy[at];
        dweight[channel * taps + tap] += static_cast<long double>(t.dy[at]) * t.x[from];
      }
    }
  }
  // Numbers in (-1, 1) have variance 1/3, products of two of them 1/9.
  const double number = std::sqrt(1.0 / 3), product = 1.0 / 3;
  const auto expect_close = [&](const std::vector<T>& ours, const std::vector<long double>& expected,
                                const char* what, i64 terms, double deviation) {
    const double error = largest_error(ours, expected);
    expect(error <= rounding<T>(terms, deviation), what, c, error);
  };
  expect_close(t.y, y, "y", taps + 1, number);  // the bias among the terms
  expect_close(t.dx, dx, "dx", taps, product);
  expect_close(t.dweight, dweight, "dweight", c.batch * voxels, product);
  expect_close(t.dbias, dbias, "dbias", c.batch * voxels, number);

  for (int threads : {2, 3, 8}) {
    Tensors<T> again(c);
    again.run(c, threads);
    expect(again.y == t.y && again.dx == t.dx && again.dweight == t.dweight && again.dbias == t.dbias,
           "the same bits for any number of threads", c, threads);
  }

  // What is not asked for is not written; and strides of any order.
  Tensors<T> other(c);
  std::vector<T> reversed(t.x.size());
  const i64 stride[5] = {1, c.batch, c.batch * c.channels, c.batch * c.channels * s[0],
                         c.batch * c.channels * s[0] * s[1]};
  for (i64 at = 0; at < i64(t.x.size()); ++at) {
    const i64 map = at / voxels, voxel = at % voxels;
    const i64 index[5] = {map / c.channels, map % c.channels, voxel / s[2] / s[1], voxel / s[2] % s[1],
                          voxel % s[2]};
    i64 to = 0;
    for (int axis = 0; axis < 5; ++axis) to += index[axis] * stride[axis];
    reversed[to] = t.x[at];
  }
  fk::DepthwiseConv p = other.problem(c, 2);
  p.x.data = reversed.data();
  for (int axis = 0; axis < 5; ++axis) p.x.stride[axis] = stride[axis];
  p.dweight = other.dweight.data();
  fk::cpu_kernels().depthwise_conv_backward(p);
  expect(other.dweight == t.dweight, "dweight alone, of x in another order", c, 0);
  p.dweight = nullptr;
  p.dx = other.dx.data();
  fk::cpu_kernels().depthwise_conv_backward(p);
  expect(other.dx == t.dx, "dx alone", c, 0);
  p.y = other.y.data();
  p.bias = t.bias.data();
  fk::cpu_kernels().depthwise_conv_forward(p);
  expect(other.y == t.y, "y of x in another order", c, 0);
}

}  // namespace

int main() {
  const Case cases[] = {
      {2, 3, {1, 1, 23}, {1, 1, 3}},    {1, 1, {1, 1, 9001}, {1, 1, 7}}, {2, 2, {1, 9, 8}, {1, 3, 5}},
      {1, 1, {1, 70, 300}, {1, 7, 7}},  {1, 2, {5, 2, 4200}, {3, 3, 3}}, {1, 2, {12, 14, 16}, {3, 3, 3}},
      {2, 1, {9, 17, 33}, {5, 5, 5}},   {1, 1, {10, 11, 12}, {7, 7, 7}}, {2, 40, {4, 4, 4}, {3, 3, 3}},
      {1, 2, {3, 2, 1}, {5, 3, 7}},     {1, 2, {33, 6, 5}, {3, 1, 3}},   {1, 1, {40, 24, 24}, {3, 3, 3}},
      {1, 1, {9, 130, 140}, {3, 5, 3}}, {1, 2, {8, 8, 8}, {1, 1, 1}},    {1, 1, {1, 1, 1}, {3, 3, 3}},
      {1, 1, {20, 19, 21}, {1, 1, 5}},  {1, 1, {70, 15, 15}, {5, 3, 1}}, {3, 2, {6, 6, 6}, {3, 3, 3}},
      {0, 2, {4, 5, 6}, {3, 3, 3}},     {1, 0, {4, 5, 6}, {3, 3, 3}},    {1, 2, {4, 0, 6}, {3, 3, 3}},
  };
  for (const Case& c : cases) {
    check<float>(c);
    check<double>(c);
  }
  std::printf("%s, %s\n", fk::cpu_kernels().isa, failures == 0 ? "passed" : "failed");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

// The pointwise family without Python: values against naive loops in double, gradients against differences of
// these loops, on odd sizes and strides, with every number of threads the same bits. Meant to be run under
// the sanitizers too.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cpu/common/dispatch.h"
#include "problems/pointwise.h"

namespace fk = factorizer;
using fk::i64;

namespace {

using Numbers = std::vector<double>;
using Arguments = std::vector<Numbers>;

constexpr double epsilon = 1e-5;  // the norm's

int failures = 0;

void expect(bool condition, const std::string& what, double value) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s (%g)\n", what.c_str(), value);
}

double dot(const Numbers& a, const Numbers& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

// The distance of a from b over the length of b; NaN where a holds one.
double error(const Numbers& a, const Numbers& b) {
  double distance = 0;
  for (std::size_t i = 0; i < a.size(); ++i) distance += (a[i] - b[i]) * (a[i] - b[i]);
  const double length = std::sqrt(dot(b, b));
  return length > 0 ? std::sqrt(distance) / length : std::sqrt(distance);
}

// --- The definitions, on arrays (batch, channels, voxels) in double ----------------------------

struct Shape {
  i64 batch, channels, voxels;
  i64 at(i64 b, i64 c, i64 v) const { return (b * channels + c) * voxels + v; }
  i64 size() const { return batch * channels * voxels; }
};

// W x + b; an empty b is zero.
Numbers linear(const Shape& s, const Numbers& x, i64 rows, const Numbers& w, const Numbers& bias) {
  const Shape out{s.batch, rows, s.voxels};
  Numbers y(out.size());
  for (i64 b = 0; b < s.batch; ++b)
    for (i64 r = 0; r < rows; ++r)
      for (i64 v = 0; v < s.voxels; ++v) {
        double sum = bias.empty() ? 0.0 : bias[r];
        for (i64 c = 0; c < s.channels; ++c) sum += w[r * s.channels + c] * x[s.at(b, c, v)];
        y[out.at(b, r, v)] = sum;
      }
  return y;
}

Numbers norm(const Shape& s, const Numbers& x, const Numbers& scale, const Numbers& shift) {
  Numbers y(x.size());
  for (i64 b = 0; b < s.batch; ++b)
    for (i64 v = 0; v < s.voxels; ++v) {
      double mean = 0, variance = 0;
      for (i64 c = 0; c < s.channels; ++c) mean += x[s.at(b, c, v)] / double(s.channels);
      for (i64 c = 0; c < s.channels; ++c)
        variance += std::pow(x[s.at(b, c, v)] - mean, 2) / double(s.channels);
      for (i64 c = 0; c < s.channels; ++c) {
        const i64 at = s.at(b, c, v);
        y[at] = (x[at] - mean) / std::sqrt(variance + epsilon) * scale[c] + shift[c];
      }
    }
  return y;
}

Numbers sum(Numbers a, const Numbers& b) {
  for (std::size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

// --- Operators -----------------------------------------------------------------------------------

struct Grid {
  i64 size[3], scale[3];

  i64 block() const { return scale[0] * scale[1] * scale[2]; }
  i64 coarse() const { return size[0] * size[1] * size[2]; }
  i64 fine() const { return coarse() * block(); }
  // Where place k of coarse voxel v's block lies among the fine voxels.
  i64 voxel(i64 v, i64 k) const {
    const i64 i[3] = {v / size[2] / size[1], v / size[2] % size[1], v % size[2]};
    const i64 j[3] = {k / scale[2] / scale[1], k / scale[2] % scale[1], k % scale[2]};
    i64 at = 0;
    for (int axis = 0; axis < 3; ++axis) at = at * size[axis] * scale[axis] + i[axis] * scale[axis] + j[axis];
    return at;
  }
};

// The memory of a call: of arguments, the result, its gradient and theirs.
struct Memory {
  std::vector<fk::FeatureMap> maps, dmaps;  // the first arguments
  std::vector<const void*> weights;         // the others
  std::vector<void*> dweights;
  fk::FeatureMap out, dout;
};

// An operator of some sizes: what its definition gives, and the kernels' calls.
struct Operator {
  std::string name;
  std::vector<Shape> maps;
  std::vector<i64> weights;  // elements; 0: not given
  Shape out;
  i64 terms;  // of the longest chain of sums that lead to an element of the result
  std::function<Numbers(const Arguments&)> define;
  std::function<void(const fk::Pointwise&, const Memory&, bool backward)> run;
};

Operator norm_linear(i64 batch, i64 voxels, i64 channels, i64 rows, bool norms, bool maps) {
  const Shape x{batch, channels, voxels};
  if (!maps) rows = channels;
  Operator o;
  o.name = norms && maps ? "norm_linear" : norms ? "layer_norm" : "linear";
  o.maps = {x};
  o.weights = {norms ? channels : 0, norms ? channels : 0, maps ? rows * channels : 0, maps ? rows : 0};
  o.out = {batch, rows, voxels};
  o.terms = (norms ? 2 * channels : 0) + channels;
  o.define = [=](const Arguments& a) {
    const Numbers n = norms ? norm(x, a[0], a[1], a[2]) : a[0];
    return maps ? linear(x, n, rows, a[3], a[4]) : n;
  };
  o.run = [=](const fk::Pointwise& sizes, const Memory& m, bool backward) {
    fk::NormLinear p{};
    static_cast<fk::Pointwise&>(p) = sizes;
    p.voxels = voxels, p.channels = channels, p.out_channels = rows;
    p.x = m.maps[0], p.y = m.out, p.dy = m.dout, p.dx = m.dmaps[0];
    p.norm_weight = m.weights[0], p.norm_bias = m.weights[1], p.weight = m.weights[2], p.bias = m.weights[3];
    p.dnorm_weight = m.dweights[0], p.dnorm_bias = m.dweights[1];
    p.dweight = m.dweights[2], p.dbias = m.dweights[3];
    backward ? fk::cpu_kernels().norm_linear_backward(p) : fk::cpu_kernels().norm_linear_forward(p);
  };
  return o;
}

Operator linear_norm_mlp(i64 batch, i64 voxels, i64 in_channels, i64 channels, i64 hidden) {
  const Shape y{batch, in_channels, voxels}, x{batch, channels, voxels}, h{batch, hidden, voxels};
  Operator o;
  o.name = "linear_norm_mlp";
  o.maps = {y, x};
  o.weights = {channels * in_channels, channels, channels,          channels,
               hidden * channels,      hidden,   channels * hidden, channels};
  o.out = x;
  o.terms = in_channels + 3 * channels + hidden;
  o.define = [=](const Arguments& a) {
    const Numbers z = sum(a[1], linear(y, a[0], channels, a[2], a[3]));
    Numbers g = linear(x, norm(x, z, a[4], a[5]), hidden, a[6], a[7]);
    for (double& value : g) value *= std::erfc(-value / std::sqrt(2.0)) / 2;
    return sum(z, linear(h, g, channels, a[8], a[9]));
  };
  o.run = [=](const fk::Pointwise& sizes, const Memory& m, bool backward) {
    fk::LinearNormMLP p{};
    static_cast<fk::Pointwise&>(p) = sizes;
    p.voxels = voxels, p.in_channels = in_channels, p.channels = channels, p.hidden = hidden;
    p.y = m.maps[0], p.x = m.maps[1], p.out = m.out, p.dout = m.dout, p.dy = m.dmaps[0], p.dx = m.dmaps[1];
    const void** weights[] = {&p.weight,  &p.bias,  &p.norm_weight, &p.norm_bias,
                              &p.weight1, &p.bias1, &p.weight2,     &p.bias2};
    void** dweights[] = {&p.dweight,  &p.dbias,  &p.dnorm_weight, &p.dnorm_bias,
                         &p.dweight1, &p.dbias1, &p.dweight2,     &p.dbias2};
    for (int i = 0; i < 8; ++i) *weights[i] = m.weights[i], *dweights[i] = m.dweights[i];
    backward ? fk::cpu_kernels().linear_norm_mlp_backward(p) : fk::cpu_kernels().linear_norm_mlp_forward(p);
  };
  return o;
}

void set_grid(fk::Blocks& p, const Grid& grid) {
  p.voxels = grid.coarse();
  for (int axis = 0; axis < 3; ++axis) p.size[axis] = grid.size[axis], p.scale[axis] = grid.scale[axis];
}

Operator join(i64 batch, const Grid& grid, i64 skip_channels, i64 channels, i64 rows) {
  const Shape skip{batch, skip_channels, grid.fine()}, x{batch, channels, grid.coarse()};
  const Shape out{batch, rows, grid.fine()}, blocks{batch, rows * grid.block(), grid.coarse()};
  Operator o;
  o.name = "join";
  o.maps = {skip, x};
  o.weights = {rows * skip_channels, channels * rows * grid.block(), rows};
  o.out = out;
  o.terms = skip_channels + channels;
  o.define = [=](const Arguments& a) {
    Numbers transposed(a[3].size());
    for (i64 c = 0; c < channels; ++c)
      for (i64 r = 0; r < blocks.channels; ++r) transposed[r * channels + c] = a[3][c * blocks.channels + r];
    const Numbers placed = linear(x, a[1], blocks.channels, transposed, {});
    Numbers y = linear(skip, a[0], rows, a[2], a[4]);
    for (i64 b = 0; b < batch; ++b)
      for (i64 r = 0; r < blocks.channels; ++r)
        for (i64 v = 0; v < grid.coarse(); ++v)
          y[out.at(b, r / grid.block(), grid.voxel(v, r % grid.block()))] += placed[blocks.at(b, r, v)];
    return y;
  };
  o.run = [=](const fk::Pointwise& sizes, const Memory& m, bool backward) {
    fk::Join p{};
    static_cast<fk::Pointwise&>(p) = sizes;
    set_grid(p, grid);
    p.skip_channels = skip_channels, p.channels = channels, p.out_channels = rows;
    p.skip = m.maps[0], p.x = m.maps[1], p.y = m.out, p.dy = m.dout, p.dskip = m.dmaps[0], p.dx = m.dmaps[1];
    p.skip_weight = m.weights[0], p.weight = m.weights[1], p.bias = m.weights[2];
    p.dskip_weight = m.dweights[0], p.dweight = m.dweights[1], p.dbias = m.dweights[2];
    backward ? fk::cpu_kernels().join_backward(p) : fk::cpu_kernels().join_forward(p);
  };
  return o;
}

Operator patch_conv(i64 batch, const Grid& grid, i64 channels, i64 rows) {
  const Shape x{batch, channels, grid.fine()}, blocks{batch, channels * grid.block(), grid.coarse()};
  Operator o;
  o.name = "patch_conv";
  o.maps = {x};
  o.weights = {rows * blocks.channels, rows};
  o.out = {batch, rows, grid.coarse()};
  o.terms = blocks.channels;
  o.define = [=](const Arguments& a) {
    Numbers gathered(blocks.size());
    for (i64 b = 0; b < batch; ++b)
      for (i64 r = 0; r < blocks.channels; ++r)
        for (i64 v = 0; v < grid.coarse(); ++v)
          gathered[blocks.at(b, r, v)] = a[0][x.at(b, r / grid.block(), grid.voxel(v, r % grid.block()))];
    return linear(blocks, gathered, rows, a[1], a[2]);
  };
  o.run = [=](const fk::Pointwise& sizes, const Memory& m, bool backward) {
    fk::PatchConv p{};
    static_cast<fk::Pointwise&>(p) = sizes;
    set_grid(p, grid);
    p.channels = channels, p.out_channels = rows;
    p.x = m.maps[0], p.y = m.out, p.dy = m.dout, p.dx = m.dmaps[0];
    p.weight = m.weights[0], p.bias = m.weights[1];
    p.dweight = m.dweights[0], p.dbias = m.dweights[1];
    backward ? fk::cpu_kernels().patch_conv_backward(p) : fk::cpu_kernels().patch_conv_forward(p);
  };
  return o;
}

// --- Runs ----------------------------------------------------------------------------------------

// An array of T in memory of just its size, where a sanitizer sees what goes beyond. `gap` elements, which
// are NaN, lie between the channels of a map.
template <class T>
class Array {
 public:
  Array(const Shape& shape, i64 gap)
      : shape_(shape),
        row_(shape.voxels + gap),
        values_(shape.size() > 0 ? shape.batch * shape.channels * row_ - gap : 0,
                std::numeric_limits<T>::quiet_NaN()) {}
  Array(const Shape& shape, i64 gap, const Numbers& numbers) : Array(shape, gap) {
    for (i64 i = 0; i < shape.size(); ++i) values_[place(i)] = T(numbers[i]);
  }

  void* data() { return values_.data(); }
  fk::FeatureMap map() {
    return {values_.data(), sizeof(T) == 4 ? fk::DType::float32 : fk::DType::float64, shape_.channels * row_,
            row_};
  }
  Numbers numbers() const {
    Numbers numbers(shape_.size());
    for (i64 i = 0; i < shape_.size(); ++i) numbers[i] = values_[place(i)];
    return numbers;
  }

 private:
  i64 place(i64 i) const { return i / shape_.voxels * row_ + i % shape_.voxels; }

  Shape shape_;
  i64 row_;
  std::vector<T> values_;
};

// The result, and the gradients of all arguments; of weights only where they are asked for.
template <class T>
Arguments run(const Operator& o, const Arguments& arguments, const Numbers& dout, int threads,
              bool weight_grads = true) {
  std::vector<Array<T>> read, written;
  read.reserve(arguments.size());
  written.reserve(arguments.size());
  Array<T> out(o.out, 0), dout_array(o.out, 3, dout);
  Memory memory;
  memory.out = out.map(), memory.dout = dout_array.map();
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const bool map = i < o.maps.size();
    const Shape shape = map ? o.maps[i] : Shape{1, 1, o.weights[i - o.maps.size()]};
    read.emplace_back(shape, map ? 3 : 0, arguments[i]);
    written.emplace_back(shape, 0);
    if (map) {
      memory.maps.push_back(read[i].map());
      memory.dmaps.push_back(written[i].map());
    } else {
      const bool given = shape.voxels > 0;
      memory.weights.push_back(given ? read[i].data() : nullptr);
      memory.dweights.push_back(given && weight_grads ? written[i].data() : nullptr);
    }
  }
  fk::Pointwise sizes{sizeof(T) == 4 ? fk::DType::float32 : fk::DType::float64, o.out.batch, 0, epsilon,
                      threads};
  o.run(sizes, memory, false);
  o.run(sizes, memory, true);
  Arguments results{out.numbers()};
  for (const Array<T>& array : written) results.push_back(array.numbers());
  return results;
}

void check(const Operator& o) {
  std::mt19937 random(11);
  std::uniform_real_distribution<float> uniform(-1, 1);  // numbers that both precisions hold
  const auto draw = [&](i64 count) {
    Numbers numbers(count);
    for (double& n : numbers) n = uniform(random);
    return numbers;
  };
  Arguments arguments;
  for (const Shape& shape : o.maps) arguments.push_back(draw(shape.size()));
  for (i64 count : o.weights) arguments.push_back(draw(count));
  const Numbers dout = draw(o.out.size());
  const std::string name = o.name + " of " + std::to_string(o.out.batch) + " x " +
                           std::to_string(o.maps.back().channels) + " x " +
                           std::to_string(o.maps.back().voxels);

  // An element is reached by `terms` roundings, each of a partial sum. Their errors add up as the root of the
  // number, what cancels in the sums makes them larger by another root at most. A weight's gradient is a sum
  // over the voxels besides.
  const auto rounding = [](auto type, i64 terms) {
    return double(std::numeric_limits<decltype(type)>::epsilon()) * double(terms + 8);
  };
  const i64 all_terms = 4 * o.terms + o.out.batch * o.out.voxels;
  const Arguments ours = run<double>(o, arguments, dout, 1), single = run<float>(o, arguments, dout, 1);
  const double value_error = error(ours[0], o.define(arguments));
  expect(value_error < rounding(double(), o.terms), name + ": value", value_error);
  for (std::size_t i = 0; i < single.size(); ++i) {
    const double difference = error(single[i], ours[i]);
    expect(difference < rounding(float(), i == 0 ? o.terms : all_terms),
           name + ": float, result " + std::to_string(i), difference);
  }

  // The gradient along a random direction of each argument, by a fourth-order difference: a step h leaves an
  // error of h^4 and the values' rounding over h.
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].empty()) continue;
    const Numbers direction = draw(i64(arguments[i].size()));
    const auto loss = [&](double step) {
      Arguments moved = arguments;
      for (std::size_t k = 0; k < direction.size(); ++k) moved[i][k] += step * direction[k];
      return dot(dout, o.define(moved));
    };
    constexpr double h = 1e-3;
    const double slope = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h);
    const double scale = std::sqrt(dot(ours[i + 1], ours[i + 1]) * dot(direction, direction));
    const double difference = std::fabs(dot(ours[i + 1], direction) - slope) / (scale > 0 ? scale : 1);
    expect(difference < 1e-8, name + ": gradient " + std::to_string(i), difference);
  }

  for (int threads : {2, 3, 8}) {
    expect(run<double>(o, arguments, dout, threads) == ours, name + ": the same bits for any threads",
           threads);
    expect(run<float>(o, arguments, dout, threads) == single, name + ": the same bits for any threads",
           threads);
  }
  const Arguments maps_alone = run<double>(o, arguments, dout, 2, false);
  for (std::size_t i = 0; i <= o.maps.size(); ++i)
    expect(maps_alone[i] == ours[i], name + ": without the weights' gradients", double(i));
  for (std::size_t i = o.maps.size() + 1; i < maps_alone.size(); ++i)
    for (double value : maps_alone[i]) expect(std::isnan(value), name + ": what is not asked for", value);
}

}  // namespace

int main() {
  const Grid grids[] = {{{1, 1, 5}, {1, 1, 2}},  {{1, 3, 7}, {1, 2, 2}}, {{3, 4, 5}, {2, 2, 2}},
                        {{2, 1, 9}, {1, 3, 4}},  {{1, 1, 1}, {2, 2, 2}}, {{5, 5, 7}, {1, 1, 1}},
                        {{1, 1, 200}, {1, 1, 3}}};
  const i64 sizes[][4] = {{1, 1, 1, 1}, {2, 7, 3, 5}, {1, 300, 33, 9}, {3, 129, 8, 20}, {2, 400, 16, 31}};
  for (const auto& [batch, voxels, channels, rows] : sizes) {
    check(norm_linear(batch, voxels, channels, rows, true, true));
    check(norm_linear(batch, voxels, channels, rows, true, false));
    check(norm_linear(batch, voxels, channels, rows, false, true));
    check(linear_norm_mlp(batch, voxels, rows, channels, 2 * channels + 1));
  }
  for (const Grid& grid : grids) {
    check(join(2, grid, 3, 5, 7));
    check(join(1, grid, 17, 2, 1));
    check(patch_conv(2, grid, 3, 5));
    check(patch_conv(1, grid, 1, 18));
  }
  std::printf("%s, %s\n", fk::cpu_kernels().isa, failures == 0 ? "passed" : "failed");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

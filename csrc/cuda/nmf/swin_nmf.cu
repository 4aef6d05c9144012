// swin_nmf on a CUDA device: which kernels a problem takes, and what they need. Host code alone.
//
// One copy: a kernel reads x and writes y (backward: reads x and dy, writes dx). Several copies: a kernel
// reads the windows of all of them and writes their small factors, and a second one writes y, each voxel
// once. At rank 1 after a ReLU the backward goes the same way: dX is linear in a window's X and a few
// vectors. Else it takes a launch for each copy: a voxel lies in one window of each, so the first writes dx
// and the later ones add to it.
#include <initializer_list>

#include "cuda/nmf/stages.cuh"

namespace factorizer {
namespace cuda {
namespace {

constexpr i64 programs_per_processor = 4;  // blocks of the backward that share a multiprocessor

void check_served(const SwinNMF& p) {
  const Windows& w = p.windows;
  bool served = p.dtype != DType::float64 && w.head_dim <= max_rows && w.columns() <= max_columns &&
                p.options.rank <= max_rank && w.num_shifts <= max_shifts && w.num_matrices() <= max_windows;
  served = served && p.options.num_iters <= 0x7fffffff;  // an int counts them
  for (i64 size : w.size) served = served && size <= max_extent;
  if (!served) throw std::invalid_argument("the backend 'cuda' does not serve this problem");
}

// The identity of rank_one.h holds, and its kernels keep the iterations. (After a ReLU there is always a y.)
bool rank_one_applies(const NMFOptions& o) {
  return o.rank == 1 && o.hals && o.relu && o.num_iters > 0 && o.num_iters <= max_rank_one_iters;
}

Map map_of(const Volume& volume, DType dtype) {
  Map map{volume.data, {}, dtype};
  for (int axis = 0; axis < 5; ++axis) map.stride[axis] = volume.stride[axis];
  return map;
}

Map contiguous(void* data, DType dtype, const Windows& w) {
  const i64 plane = w.size[1] * w.size[2], voxels = w.voxels();
  return {data, {w.heads * w.head_dim * voxels, voxels, plane, w.size[2], 1}, dtype};
}

bool on_multiple(const void* data, i64 bytes) { return reinterpret_cast<std::uintptr_t>(data) % bytes == 0; }

// Whether chunks of neighbouring columns can be moved by one instruction.
bool is_wide(const Windows& w, std::initializer_list<Map> maps, std::initializer_list<const void*> factors) {
  if (w.patch[2] % 4 != 0) return false;
  for (i64 copy = 0; copy < w.num_shifts; ++copy) {
    if (w.shifts[3 * copy + 2] % 4 != 0) return false;
  }
  const i64 extent[4] = {w.batch, w.heads * w.head_dim, w.size[0], w.size[1]};
  for (const Map& map : maps) {
    if (map.data == nullptr) continue;
    const i64 element = map.dtype == DType::float32 ? 4 : 2;
    if (map.stride[4] != 1 || !on_multiple(map.data, 4 * element)) return false;
    for (int axis = 0; axis < 4; ++axis) {
      if (extent[axis] > 1 && map.stride[axis] % 4 != 0) return false;
    }
  }
  for (const void* factor : factors) {
    if (!on_multiple(factor, 16)) return false;
  }
  return true;
}

i64 rounded(i64 floats) { return (floats + 3) / 4 * 4; }

i64 v_size(const SwinNMF& p) {
  return rounded(p.windows.num_matrices() * p.options.rank * p.windows.columns());
}

}  // namespace

Plan plan_forward(const SwinNMF& p, bool factors) {
  check_served(p);
  const Windows& w = p.windows;
  const bool gathers = !factors && w.num_shifts > 1;
  return {gathers ? v_size(p) + w.num_matrices() * p.options.rank * w.head_dim : 0, 0, false};
}

Plan plan_backward(const SwinNMF& p, i64 processors) {
  check_served(p);
  const Windows& w = p.windows;
  if (w.num_matrices() == 0) return {0, 0, false};
  if (rank_one_applies(p.options)) {
    const i64 coefficients = w.num_matrices() * static_cast<i64>(sizeof(Coefficients) / sizeof(float));
    return {w.num_shifts > 1 ? v_size(p) + coefficients : 0, 0, false};
  }
  const i64 per_shift = w.num_matrices() / w.num_shifts, wanted = programs_per_processor * processors;
  const i64 programs = per_shift < wanted ? per_shift : wanted;
  const i64 tape =
      p.options.grad_steps * tape_size(p.options.rank, iterations_threads(DeviceWindows(w, false)));
  return {programs * tape, programs, w.num_shifts > 1};
}

void swin_nmf_forward(const SwinNMF& p, float* work, const Target& target) {
  const Windows& w = p.windows;
  if (w.num_matrices() == 0) return;  // a grid has a block at least
  const Launcher launch(target, "swin_nmf");
  const Map x = map_of(p.x, p.dtype), y = contiguous(p.y, p.dtype, w);
  const bool gathers = p.u.data == nullptr && w.num_shifts > 1;
  float* v = gathers ? work : static_cast<float*>(p.v.data);
  float* u = gathers ? work + v_size(p) : static_cast<float*>(p.u.data);
  const DeviceWindows windows(w, is_wide(w, {x, y}, {p.v0.data, v}));
  if (rank_one_applies(p.options)) {
    rank_one_forward(launch, windows, p.options, x, p.v0, y, u, v);
  } else {
    iterations_forward(launch, windows, p.options, x, p.u0, p.v0, y, u, v);
  }
  if (gathers) gather_products(launch, windows, p.options.rank, u, v, y);
}

void swin_nmf_backward(const SwinNMF& p, const Plan& plan, float* work, DType dx_dtype,
                       const Target& target) {
  const Windows& w = p.windows;
  if (w.num_matrices() == 0) return;
  const Launcher launch(target, "swin_nmf_backward");
  const Map x = map_of(p.x, p.dtype), dy = map_of(p.dy, p.dtype), dx = contiguous(p.dx, dx_dtype, w);
  const float *du = static_cast<const float*>(p.du.data), *dv = static_cast<const float*>(p.dv.data);
  float *du0 = static_cast<float*>(p.du0.data), *dv0 = static_cast<float*>(p.dv0.data);
  const DeviceWindows windows(w, is_wide(w, {x, dy, dx}, {p.v0.data, dv, dv0, work}));
  if (!rank_one_applies(p.options)) {
    const auto backward = p.options.rank <= 4 ? iterations_backward<1> : iterations_backward<5>;
    for (u32 copy = 0; copy < windows.num_shifts; ++copy) {
      backward(launch, windows, p.options, copy, plan.programs, x, p.u0, p.v0, dy, du, dv, dx, du0, dv0,
               work);
    }
    return;
  }
  const bool gathers = w.num_shifts > 1;
  auto* coefficients = gathers ? reinterpret_cast<Coefficients*>(work + v_size(p)) : nullptr;
  rank_one_backward(launch, windows, p.options, x, dy, p.v0, dx, coefficients, work, du0, dv0);
  if (gathers) gather_gradients(launch, windows, x, p.v0, coefficients, work, dx);
}

}  // namespace cuda
}  // namespace factorizer

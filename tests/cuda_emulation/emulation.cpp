// The fibers behind cuda_runtime.h, and what the tests ask about launches.
#include <ucontext.h>

#include <string>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

struct Launch {
  std::int64_t device, stream, blocks, threads;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 << 10);
  bool ended = false;
  Meeting meeting = Meeting::none;  // what it waits for; none: it can run
  unsigned mask = 0;
  int parameter = 0, source = 0;
  std::uint64_t value = 0;
};

int device = 0;
cudaError_t pending = cudaSuccess, next = cudaSuccess;
std::string message;
std::vector<Launch> launches;

ucontext_t scheduler;
std::vector<Fiber> fibers;
std::size_t current = 0;
const std::function<void()>* body = nullptr;

void enter() {
  (*body)();
  fibers[current].ended = true;
  swapcontext(&fibers[current].context, &scheduler);
}

void resume(std::size_t index) {
  current = index;
  const unsigned thread = static_cast<unsigned>(index);
  threadIdx = dim3(thread % blockDim.x, thread / blockDim.x);
  swapcontext(&scheduler, &fibers[index].context);
}

// Lets a warp go on whose lanes in the mask of `first` have all come to the same exchange.
bool meet_in_warp(std::size_t warp, std::size_t first) {
  const Fiber& wanted = fibers[first];
  for (int i = 0; i < 32; ++i) {
    if ((wanted.mask >> i & 1) == 0) continue;
    const Fiber& fiber = fibers[warp + i];
    if (fiber.ended || fiber.meeting != wanted.meeting || fiber.mask != wanted.mask ||
        fiber.parameter != wanted.parameter)
      return false;
    if ((wanted.mask >> fiber.source & 1) == 0) return false;
  }
  std::uint64_t values[32];
  for (int i = 0; i < 32; ++i) values[i] = fibers[warp + i].value;
  for (int i = 0; i < 32; ++i) {
    if ((wanted.mask >> i & 1) == 0) continue;
    Fiber& fiber = fibers[warp + i];
    fiber.value = values[fiber.source];
    fiber.meeting = Meeting::none;
  }
  return true;
}

bool meet_in_block(std::size_t threads) {
  for (std::size_t i = 0; i < threads; ++i) {
    if (fibers[i].ended || fibers[i].meeting != Meeting::block) return false;
  }
  for (std::size_t i = 0; i < threads; ++i) fibers[i].meeting = Meeting::none;
  return true;
}

std::string who_waits(std::size_t threads) {
  std::string text = "some threads wait for others that never come:";
  const char* places[] = {"", "__syncthreads", "__syncwarp", "__shfl_sync", "__shfl_xor_sync"};
  for (std::size_t i = 0; i < threads; ++i) {
    const char* place = fibers[i].ended ? "the end" : places[static_cast<int>(fibers[i].meeting)];
    text += (i == 0 ? " " : ", ") + std::to_string(i) + " at " + place;
  }
  return text;
}

bool run_block(std::size_t threads) {
  for (std::size_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.ended = false;
    fiber.meeting = Meeting::none;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (;;) {
    std::size_t ended = 0;
    for (std::size_t i = 0; i < threads; ++i) {
      if (!fibers[i].ended && fibers[i].meeting == Meeting::none) resume(i);
      ended += fibers[i].ended;
    }
    if (ended == threads) return true;
    bool met = meet_in_block(threads);
    for (std::size_t i = 0; i < threads; ++i) {
      const Meeting meeting = fibers[i].meeting;
      if (!fibers[i].ended && meeting != Meeting::none && meeting != Meeting::block) {
        met = meet_in_warp(i / 32 * 32, i) || met;
      }
    }
    if (!met) {
      message = who_waits(threads);
      return false;
    }
  }
}

}  // namespace

std::uint64_t meet(Meeting meeting, unsigned mask, int parameter, int source, std::uint64_t value) {
  Fiber& fiber = fibers[current];
  fiber.meeting = meeting;
  fiber.mask = mask;
  fiber.parameter = parameter;
  fiber.source = source;
  fiber.value = value;
  swapcontext(&fiber.context, &scheduler);
  return fiber.value;
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const unsigned threads = config.blockDim.x * config.blockDim.y, blocks = config.gridDim.x;
  if (next != cudaSuccess) {
    pending = next;
    next = cudaSuccess;
    message = "an error asked for by a test";
    return pending;
  }
  // Whole warps: shuffles over a full mask need them.
  if (threads == 0 || config.blockDim.x % 32 != 0 || threads > 1024 || blocks == 0 || blocks > 0x7fffffffu) {
    message = "invalid configuration";
    return pending = cudaErrorInvalidConfiguration;
  }
  launches.push_back({device, reinterpret_cast<std::int64_t>(config.stream), blocks, threads});
  if (fibers.size() < threads) fibers.resize(threads);
  body = &kernel;
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  for (unsigned block = 0; block < blocks; ++block) {
    blockIdx = dim3(block);
    if (!run_block(threads)) return pending = cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace emulation

cudaError_t cudaGetDevice(int* device) {
  *device = emulation::device;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::pending;
  emulation::pending = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t) { return emulation::message.c_str(); }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

// For the tests, by ctypes.
#pragma GCC visibility push(default)
extern "C" {

// Copies (device, stream, blocks, threads) of up to `room` launches since the last call; returns how many
// there were.
int emulation_launches(std::int64_t* to, int room) {
  const int count = static_cast<int>(emulation::launches.size());
  for (int i = 0; i < count && i < room; ++i)
    std::memcpy(to + 4 * i, &emulation::launches[i], sizeof(emulation::Launch));
  emulation::launches.clear();
  return count;
}

void emulation_set_device(int device) { emulation::device = device; }

int emulation_pending_error() { return emulation::pending; }

void emulation_fail_next_launch(int error) { emulation::next = static_cast<cudaError_t>(error); }
}

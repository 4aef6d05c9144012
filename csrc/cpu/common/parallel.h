// Fork-join parallelism on whatever team of threads the host program uses.
#pragma once

#include <cstddef>
#include <type_traits>

#include "common/base.h"

namespace factorizer {

// Runs body(context, task, worker) for every task in [0, tasks), worker in [0, threads): a worker runs one
// task at a time. Tasks are handed out in order; which worker gets which is left open, so results must not
// depend on it. body must not throw. All that it has written is there for whatever follows, streamed or not.
using Body = void (*)(void* context, i64 task, int worker);
void parallel_for(i64 tasks, int threads, Body body, void* context);

template <class F>
void parallel_for(i64 tasks, int threads, F&& body) {
  using Function = std::remove_reference_t<F>;
  parallel_for(
      tasks, threads,
      [](void* context, i64 task, int worker) { (*static_cast<Function*>(context))(task, worker); }, &body);
}

// A team launcher with the signature of libgomp's GOMP_parallel: runs region(data) once on each of
// `threads` threads (fewer is allowed) and joins them. Null: threads of our own, started for each call.
using TeamLauncher = void (*)(void (*region)(void*), void* data, unsigned threads, unsigned flags);
void set_team_launcher(TeamLauncher launcher);

struct MemoryBlock {
  void* data;
  std::size_t bytes;
};

// Cache-line aligned scratch memory, uninitialised. Throws std::bad_alloc. Up to 16 MiB are kept for the
// thread's next calls.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return block_.data; }

 private:
  MemoryBlock block_;
};

// Tells the system that all of a large fresh output will be written: it may then back it by huge pages, which
// spares thousands of page faults. The contents stay as they are.
void expect_writes(void* data, i64 bytes);

}  // namespace factorizer

#include "cpu/common/parallel.h"

#ifdef _WIN32
#include <process.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <emmintrin.h>
#endif

#include <atomic>
#include <cstdint>
#include <exception>
#include <new>
#include <thread>
#include <vector>

namespace factorizer {
namespace {

i64 this_process() {
#ifdef _WIN32
  return _getpid();
#else
  return getpid();
#endif
}

std::atomic<TeamLauncher> team_launcher{nullptr};
// A team of OpenMP threads does not survive fork: a child starts threads of its own.
std::atomic<i64> team_process{0};

// Stores past the caches keep no order with others but for this.
void finish_streams() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_sfence();
#endif
}

struct Region {
  i64 tasks;
  Body body;
  void* context;
  std::atomic<i64> next_task{0};
  std::atomic<int> next_worker{0};

  void work() {
    const int worker = next_worker.fetch_add(1, std::memory_order_relaxed);
    for (;;) {
      const i64 task = next_task.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) break;
      body(context, task, worker);
    }
    finish_streams();
  }

  static void run(void* region) { static_cast<Region*>(region)->work(); }
};

void launch_own_threads(Region& region, int threads) {
  std::vector<std::thread> team;
  team.reserve(threads - 1);
  for (int t = 1; t < threads; ++t) {
    try {
      team.emplace_back(Region::run, &region);
    } catch (const std::exception&) {
      break;  // The system has no more threads, or memory for one: those that there are do the work.
    }
  }
  region.work();
  for (std::thread& thread : team) thread.join();
}

constexpr std::size_t line = 64;  // of the cache
// Not std::aligned_alloc, which Windows lacks.
void* allocate(std::size_t bytes) { return ::operator new(bytes, std::align_val_t{line}); }
void release(void* data) { ::operator delete(data, std::align_val_t{line}); }

// What a thread's last calls have freed, for its next ones: the C library gives it back to the system, which
// clears each page when it is touched again, a third of the time of a small factorisation.
class FreedBlocks {
 public:
  ~FreedBlocks() {
    while (count_ > 0) drop_oldest();
  }

  // The smallest block that holds so many bytes; without data where there is none.
  MemoryBlock take(std::size_t bytes) {
    int best = count_;
    for (int i = 0; bytes >= least_bytes && i < count_; ++i) {
      if (blocks_[i].bytes >= bytes && (best == count_ || blocks_[i].bytes < blocks_[best].bytes)) best = i;
    }
    return best < count_ ? remove(best) : MemoryBlock{nullptr, bytes};
  }

  void give(MemoryBlock block) {
    if (block.bytes < least_bytes || block.bytes > most_bytes) return release(block.data);
    while (count_ == most_blocks || bytes_ + block.bytes > most_bytes) drop_oldest();
    blocks_[count_++] = block;
    bytes_ += block.bytes;
  }

 private:
  static constexpr int most_blocks = 8;
  static constexpr std::size_t least_bytes = 64 << 10;  // of what the C library gives back
#ifdef FK_SANITIZE_address
  static constexpr std::size_t most_bytes = 0;  // so that it sees each block's bounds and its end
#else
  static constexpr std::size_t most_bytes = 16 << 20;
#endif

  MemoryBlock remove(int index) {
    const MemoryBlock block = blocks_[index];
    for (int i = index + 1; i < count_; ++i) blocks_[i - 1] = blocks_[i];
    --count_;
    bytes_ -= block.bytes;
    return block;
  }
  void drop_oldest() { release(remove(0).data); }

  MemoryBlock blocks_[most_blocks];
  int count_ = 0;
  std::size_t bytes_ = 0;
};

thread_local FreedBlocks freed_blocks;

}  // namespace

void set_team_launcher(TeamLauncher launcher) {
  team_launcher.store(launcher);
  team_process.store(this_process());
}

void parallel_for(i64 tasks, int threads, Body body, void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    for (i64 task = 0; task < tasks; ++task) body(context, task, 0);
    return finish_streams();
  }
  Region region;
  region.tasks = tasks;
  region.body = body;
  region.context = context;
  const TeamLauncher launcher = team_launcher.load();
  if (launcher != nullptr && team_process.load() == this_process()) {
    launcher(Region::run, &region, static_cast<unsigned>(threads), 0);
  } else {
    launch_own_threads(region, threads);
  }
}

Scratch::Scratch(std::size_t bytes) {
  block_ = freed_blocks.take((bytes + line) / line * line);
  if (block_.data == nullptr) block_.data = allocate(block_.bytes);
}

Scratch::~Scratch() { freed_blocks.give(block_); }

void expect_writes(void* data, i64 bytes) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t huge_page = 2 << 20;
  const auto begin = (reinterpret_cast<std::uintptr_t>(data) + huge_page - 1) / huge_page * huge_page;
  const auto end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / huge_page * huge_page;
  // A hint: where the system refuses, pages fault one by one as ever.
  if (bytes >= 4 * i64(huge_page) && begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace factorizer

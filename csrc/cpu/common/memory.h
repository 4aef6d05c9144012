// A task's scratch memory, and sums over tasks that are added in one order whoever runs them.
#pragma once

#include "cpu/common/parallel.h"

namespace factorizer {
namespace FK_ISA {

// Hands out pieces of one block of memory; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(i64 count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * i64(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
  i64 used() const { return used_; }

 private:
  char* base_;
  i64 used_ = 0;
};

template <class T>
inline void fill(T* p, i64 count, T value) {
  for (i64 i = 0; i < count; ++i) p[i] = value;
}

template <class T>
inline void copy(const T* from, i64 count, T* to) {
  for (i64 i = 0; i < count; ++i) to[i] = from[i];
}

// Each task leaves its share of some sums; the shares are added in the tasks' order, in double.
template <class T>
class OrderedSums {
 public:
  OrderedSums(i64 tasks, i64 size, Arena& arena) : size_(size), shares_(arena.take<T>(tasks * size)) {}

  i64 size() const { return size_; }
  T* share(i64 task) const { return shares_ + task * size_; }

  // to[i] = the sum over the tasks of their shares' element first + i.
  template <class To>
  void add(i64 tasks, i64 first, i64 count, To* to) const {
    constexpr i64 block = 256;
    if (tasks == 1) {
      for (i64 i = 0; i < count; ++i) to[i] = To(shares_[first + i]);
      return;
    }
    for (i64 begin = 0; begin < count; begin += block) {
      const i64 length = count - begin < block ? count - begin : block;
      double totals[block];
      fill(totals, length, 0.0);
      for (i64 task = 0; task < tasks; ++task) {
        const T* share = shares_ + task * size_ + first + begin;
        for (i64 i = 0; i < length; ++i) totals[i] += share[i];
      }
      for (i64 i = 0; i < length; ++i) to[begin + i] = To(totals[i]);
    }
  }

 private:
  i64 size_;
  T* shares_;
};

// sums += `count` arrays of `size` elements that lie one after another, in their order.
template <class T>
void add_in_order(const T* arrays, i64 count, i64 size, double* sums, int threads) {
  constexpr i64 block = 256;
  parallel_for((size + block - 1) / block, threads, [&](i64 task, int) {
    const i64 begin = task * block, end = begin + block < size ? begin + block : size;
    for (i64 k = 0; k < count; ++k) {
      for (i64 i = begin; i < end; ++i) sums[i] += arrays[k * size + i];
    }
  });
}

}  // namespace FK_ISA
}  // namespace factorizer

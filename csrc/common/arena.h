// Scratch memory of a kernel, for cpu.cpp files; bind.cpp allocates it
// (parallel_with_scratch in bind.h).
#pragma once

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace uz::UZ_ISA {

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Hands out parts of one block, uninitialised and aligned to 64 bytes. Without
// a block it only counts, so that the code that lays the memory out also tells
// how much it needs.
class Arena {
 public:
  explicit Arena(float* block) : block_(block) {}

  float* take(int64_t floats) {
    const int64_t at = used_;
    used_ += round_up(floats, 16);
#if defined(__SANITIZE_ADDRESS__)  // what lies between two parts is not to be touched
    used_ += 16;
    if (block_ != nullptr) {
      ASAN_UNPOISON_MEMORY_REGION(block_ + at, floats * sizeof(float));
      ASAN_POISON_MEMORY_REGION(block_ + at + floats, (used_ - at - floats) * sizeof(float));
    }
#endif
    return block_ == nullptr ? nullptr : block_ + at;
  }

  int64_t used() const { return used_; }

 private:
  float* block_;
  int64_t used_ = 0;
};

}  // namespace uz::UZ_ISA

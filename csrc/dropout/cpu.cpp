// Dropout in one pass over memory. Floor: 120 instructions for the 128 draws of a group, and 6 for a vector of
// elements.
#include "common/philox.h"
#include "dropout/kernels.h"

namespace uz::UZ_ISA {
namespace {

void run(const Dropout& a, int64_t begin, int64_t end) {
  visit(a.dtype, [&]<class T>(T) {
    const Philox random(a.seed);
    const Keep keep(a.keep);
    const Vec scale = set1(65536.0f / static_cast<float>(a.keep));
    const auto group = [&](int64_t index, const T* x, T* y) {
      for (int64_t lane = 0; lane < 16; lane += kLanes) {
        const uint64_t block = static_cast<uint64_t>(index) * 16 + static_cast<uint64_t>(lane);
        const Draws draws = random(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 0);
#pragma GCC unroll 8
        for (int slot = 0; slot < 8; ++slot) {
          const int64_t i = slot * 16 + lane;
          store(y + i, keep(draws, slot, load(x + i) * scale));
        }
      }
    };
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * Dropout::kGroup, left = a.elements - first;
      const T* x = static_cast<const T*>(a.x) + first;
      T* y = static_cast<T*>(a.y) + first;
      if (left >= Dropout::kGroup) {
        group(index, x, y);
      } else {
        T from[Dropout::kGroup] = {}, to[Dropout::kGroup];
        __builtin_memcpy(from, x, static_cast<size_t>(left) * sizeof(T));
        group(index, from, to);
        __builtin_memcpy(y, to, static_cast<size_t>(left) * sizeof(T));
      }
    }
  });
}

}  // namespace

const DropoutKernels dropout_kernels = {run};

}  // namespace uz::UZ_ISA

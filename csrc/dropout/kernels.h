// y = x / keep where the draw of the element keeps it, else 0. Element e, in the order of the indices, has the 16 bits
// of slot (e % 128) / 16 of the Philox block whose counter is (e / 128) * 16 + e % 16, in 64 bits, and two zeros.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/types.h"

namespace uz {

struct Dropout {
  static constexpr int64_t kGroup = 128;

  const void* x;  // contiguous
  void* y;
  int64_t elements;
  uint64_t seed;
  int64_t keep;  // of 65536
  DType dtype;
};

struct DropoutKernels {
  void (*run)(const Dropout&, int64_t begin, int64_t end);  // groups of kGroup elements
};

UZ_KERNELS(DropoutKernels, dropout_kernels)

}  // namespace uz

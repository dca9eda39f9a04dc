// The sums of a classic Runge-Kutta step over elements [begin, end) of contiguous arrays.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/types.h"

namespace uz {

struct Rk4Combine {  // out = h + dt / 6 * (k1 + 2 k2 + 2 k3 + k4)
  const void *h, *k1, *k2, *k3, *k4;
  void* out;
  DType state, slope;  // of h and out; of k1..k4
  float sixth;         // dt / 6
};

struct Rk4Stage {  // out = h + c * k
  const void *h, *k;
  void* out;
  DType state, slope;
  float c;
};

struct Rk4Kernels {
  void (*combine)(const Rk4Combine&, int64_t begin, int64_t end);
  void (*stage)(const Rk4Stage&, int64_t begin, int64_t end);
};

UZ_KERNELS(Rk4Kernels, rk4_kernels)

namespace cuda {

Error rk4_combine(const Rk4Combine& args, int64_t elements, Stream stream);
Error rk4_stage(const Rk4Stage& args, int64_t elements, Stream stream);

}  // namespace cuda

}  // namespace uz

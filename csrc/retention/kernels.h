// o_n = sum_m exp(log_decay |n - m|) (q_n . k_m) v_m within each document, over the m that the mode names.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/types.h"

namespace uz {

enum class RetentionMode : int { both, causal, anticausal };  // every m; m <= n; m >= n

struct Retention {
  const void *q, *k, *v;    // (batch, length, heads, key), the same, (batch, length, heads, value), contiguous
  void* o;                  // (batch, length, heads, value)
  const float* log_decay;   // (heads,)
  const int64_t* segments;  // (batch, length), 0 at padding; or null: each row is one document
  int64_t length, heads, key, value, chunk;
  DType dtype;
  RetentionMode mode;
};

struct RetentionKernels {
  void (*retention)(const Retention&, int64_t begin, int64_t end);  // items row * heads + head
};

UZ_KERNELS(RetentionKernels, retention_kernels)

}  // namespace uz

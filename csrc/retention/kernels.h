// o_n = sum_m exp(log_decay |n - m|) (q_n . k_m) v_m within each document, over
// every m or over m <= n.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/types.h"

namespace uz {

struct Retention {
  const void *q, *k, *v;    // (batch, length, heads, key), the same, (batch,
                            // length, heads, value), contiguous
  void* o;                  // (batch, length, heads, value)
  const float* log_decay;   // (heads,)
  const int64_t* segments;  // (batch, length), 0 at padding; or null: each row
                            // is one document
  int64_t length, heads, key, value, chunk;
  DType dtype;
  bool causal;
};

struct RetentionBackward {
  Retention forward;   // its o is not used
  const void* grad;    // of o
  void *dq, *dk, *dv;  // like q, k and v
};

// Items are row * heads + head; scratch is as many floats as scratch_floats
// says.
struct RetentionKernels {
  int64_t (*scratch_floats)(const Retention&);
  void (*forward)(const Retention&, float* scratch, int64_t begin, int64_t end);
  int64_t (*backward_scratch_floats)(const RetentionBackward&);
  void (*backward)(const RetentionBackward&, float* scratch, int64_t begin, int64_t end);
};

UZ_KERNELS(RetentionKernels, retention_kernels)

namespace cuda {

// Floats of device memory that the kernels need beside the tensors, for the forward as for the backward.
int64_t retention_work_floats(const Retention& args, int64_t batch);

// `gaps` is memory for a number of each row, or null without segments.
Error retention_forward(const Retention& args, int64_t batch, float* work, int* gaps, Stream stream);
Error retention_backward(const RetentionBackward& args, int64_t batch, float* work, int* gaps, Stream stream);

}  // namespace cuda

}  // namespace uz

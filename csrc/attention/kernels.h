// o_n = sum_m w_nm v_m / keep over the keys m that its dropout keeps, w_nm = softmax_m(scale q_n . k_m), or
// sigmoid(scale q_n . k_m - log M). The M keys of a query are the first `prefix` ones, and those of its document.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/types.h"

namespace uz {

// Rows of elements that lie together, somewhere: element (b, n, h, i) at data[b * batch + n * token + h * head + i].
struct HeadRows {
  const void* data;
  int64_t batch, token, head, width;
};

struct Attention {
  HeadRows q, k, v;         // (batch, length, heads, key), (batch, prefix + length, heads, key), and so on, value
  void* o;                  // (batch, length, heads, value), contiguous
  float* lse;               // (batch, heads, length), log2 sum_m exp(scale q_n . k_m); softmax only
  const int64_t* segments;  // (batch, length), 0 at padding, of which documents have none; or null: a row is a document
  int64_t length, heads, prefix;
  uint64_t seed;
  int64_t keep;  // of 65536; 65536: no dropout
  float scale;
  DType dtype;
  bool sigmoid;
};

struct AttentionBackward {
  Attention forward;   // o and lse are read
  HeadRows grad;       // of o
  void *dq, *dk, *dv;  // like q, k and v, contiguous
};

// Items are row * heads + head; scratch is as many floats as scratch_floats says.
struct AttentionKernels {
  int64_t (*scratch_floats)(const Attention&);
  void (*forward)(const Attention&, float* scratch, int64_t begin, int64_t end);
  int64_t (*backward_scratch_floats)(const AttentionBackward&);
  void (*backward)(const AttentionBackward&, float* scratch, int64_t begin, int64_t end);
};

UZ_KERNELS(AttentionKernels, attention_kernels)

}  // namespace uz

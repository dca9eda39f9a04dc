// o_n = sum_m sum_j q_nj k_mj w_nmj v_m within each document, with w_nmj the product of the gates exp(log_gate_ij) over
// the tokens i that a state passes on its way from m to n: m < i <= n rightwards, n <= i < m leftwards.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/types.h"

namespace uz {

struct GatedAttention {
  const void *q, *k, *v;    // (batch, length, heads, key), the same, (batch, length, heads, value), contiguous
  void* o;                  // (batch, length, heads, value)
  const float* log_gate;    // (batch, length, directions, heads, key): rightwards, then leftwards
  const int64_t* segments;  // (batch, length), 0 at padding; or null: each row is one document
  int64_t length, directions, heads, key, value;
  DType dtype;
};

struct GatedAttentionBackward {
  GatedAttention forward;  // its o is not used
  const void* grad;        // of o
  void *dq, *dk, *dv;      // like q, k and v
  float* dlog_gate;        // like log_gate
};

// Items are row * heads + head; scratch is as many floats as scratch_floats says.
struct GatedAttentionKernels {
  int64_t (*scratch_floats)(const GatedAttention&);
  void (*forward)(const GatedAttention&, float* scratch, int64_t begin, int64_t end);
  int64_t (*backward_scratch_floats)(const GatedAttentionBackward&);
  void (*backward)(const GatedAttentionBackward&, float* scratch, int64_t begin, int64_t end);
};

UZ_KERNELS(GatedAttentionKernels, gated_attention_kernels)

}  // namespace uz

// h_t = exp(dt_t A) h_t-1 + dt_t u_t B_t, y_t = (<C_t, h_t> + D u_t) silu(z_t),
// dt = softplus(delta + delta_bias): the selective scan, one state of `state`
// numbers per channel, fresh at the start of each document.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/types.h"

namespace uz {

inline constexpr int64_t kScanChunk = 32;  // positions between two kept states

struct SelectiveScan {
  const void *u, *delta, *z;  // (batch, length, dim); z may be null
  const void *B, *C;          // (batch, length, state)
  const float *A, *D,
      *bias;                // (dim, state), (dim,), (dim,); the last two may be null
  const int64_t* segments;  // (batch, length), 0 at padding; or null: each row
                            // is one document
  void* y;                  // (batch, length, dim)
  float* states;            // (batch, chunks, state, dim), the ones that enter each chunk
                            // of positions
  int64_t batch, length, dim, state;
  DType dtype;
  bool softplus, reverse;
};

struct SelectiveScanBackward {
  SelectiveScan forward;   // its y is not used, its states are only read
  const void* grad;        // of y
  void *du, *ddelta, *dz;  // dz null without z
  float *dB,
      *dC;                 // (groups, batch, length, state), to be summed over the groups
  float *dA, *dD, *dbias;  // (batch, dim, state), (batch, dim), (batch, dim), to
                           // be summed over the batch
};

// Items are row * groups + group; scratch is as many floats as scratch_floats
// says.
struct SelectiveScanKernels {
  int64_t (*groups)(int64_t dim);  // into how many items the channels of a row
                                   // are cut, on any CPU
  int64_t (*scratch_floats)(const SelectiveScan&);
  void (*forward)(const SelectiveScan&, float* scratch, int64_t begin, int64_t end);
  int64_t (*backward_scratch_floats)(const SelectiveScanBackward&);
  void (*backward)(const SelectiveScanBackward&, float* scratch, int64_t begin, int64_t end);
};

UZ_KERNELS(SelectiveScanKernels, selective_scan_kernels)

namespace cuda {

Error selective_scan_forward(const SelectiveScan& a, Stream stream);

// Into how many groups the channels are cut, on any GPU: the first size of dB and dC.
int64_t selective_scan_groups(const SelectiveScan& a);
// `carry` is memory for (batch, state, dim) floats.
Error selective_scan_backward(const SelectiveScanBackward& b, float* carry, Stream stream);

}  // namespace cuda

}  // namespace uz

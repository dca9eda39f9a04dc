// Retention, chunkwise. Floor: 8 K V flops a token and head for the two states
// (bidirectional), plus 2 C (K + V) within chunks of C tokens, and 2.5 times as
// much for the gradients; every product runs on tiles held in registers, all
// operands in L1 and L2 (C = 64, K = 64, V = 128: 190 KiB forward, 400
// backward), so the floor is the machine's fp32 multiply-add rate. Each
// document is walked by itself, chunks counted from its start: no masks, and
// padding costs nothing.
#include "common/heads.h"
#include "retention/backward.h"
#include "retention/forward.h"

namespace uz::UZ_ISA {
namespace {

int64_t forward_floats(const Retention& a) { return head_floats<RetentionForward>(a); }
int64_t backward_floats(const RetentionBackward& b) { return head_floats<RetentionGradients>(b); }

void forward(const Retention& a, float* scratch, int64_t begin, int64_t end) {
  run_heads<RetentionForward>(a, a, scratch, begin, end);
}
void backward(const RetentionBackward& b, float* scratch, int64_t begin, int64_t end) {
  run_heads<RetentionGradients>(b, b.forward, scratch, begin, end);
}

}  // namespace

const RetentionKernels retention_kernels = {forward_floats, forward, backward_floats, backward};

}  // namespace uz::UZ_ISA

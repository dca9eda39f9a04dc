// Gated linear attention, chunkwise. Floor: 4 K V flops a token, head and direction for the state, 2.5 times as much
// for the gradients: products on tiles held in registers, with operands and state in L1 and L2. The weights within a
// chunk of 16 differ by channel and cannot be one product: they are 2 x 8 K multiplications a token and direction,
// between gates kept as products, with no logarithm or exponential but one of each gate. Each document is walked by
// itself, chunks counted from its start: no masks, and padding costs nothing.
#include "common/heads.h"
#include "gated_linear_attention/backward.h"
#include "gated_linear_attention/forward.h"

namespace uz::UZ_ISA {
namespace {

int64_t forward_floats(const GatedAttention& a) { return head_floats<GatedForward>(a); }
int64_t backward_floats(const GatedAttentionBackward& b) { return head_floats<GatedGradients>(b); }

void forward(const GatedAttention& a, float* scratch, int64_t begin, int64_t end) {
  run_heads<GatedForward>(a, a, scratch, begin, end);
}
void backward(const GatedAttentionBackward& b, float* scratch, int64_t begin, int64_t end) {
  run_heads<GatedGradients>(b, b.forward, scratch, begin, end);
}

}  // namespace

const GatedAttentionKernels gated_attention_kernels = {forward_floats, forward, backward_floats, backward};

}  // namespace uz::UZ_ISA

// Gated linear attention, chunkwise. Floor: 4 K V flops a token, head and direction for the state, 2.5 times as much
// for the gradients: products on tiles held in registers, with operands and state in L1 and L2. The weights within a
// chunk of 16 differ by channel and cannot be one product: they are 2 x 8 K multiplications a token and direction,
// between gates kept as products, with no logarithm or exponential but one of each gate. Each document is walked by
// itself, chunks counted from its start: no masks, and padding costs nothing.
#include "gated_linear_attention/backward.h"
#include "gated_linear_attention/forward.h"

namespace uz::UZ_ISA {
namespace {

template <template <class> class Pass, class Args>
int64_t floats(const Args& args) {
  Arena counter(nullptr);
  Pass<float>(args, counter);
  return counter.used();
}

template <template <class> class Pass, class Args>
void run(const Args& args, const GatedAttention& a, float* scratch, int64_t begin, int64_t end) {
  visit(a.dtype, [&]<class T>(T) {
    Arena arena(scratch);
    Pass<T> pass(args, arena);
    for (int64_t item = begin; item < end; ++item) pass.run(item / a.heads, item % a.heads);
  });
}

int64_t forward_floats(const GatedAttention& a) { return floats<GatedForward>(a); }
int64_t backward_floats(const GatedAttentionBackward& b) { return floats<GatedGradients>(b); }

void forward(const GatedAttention& a, float* scratch, int64_t begin, int64_t end) {
  run<GatedForward>(a, a, scratch, begin, end);
}
void backward(const GatedAttentionBackward& b, float* scratch, int64_t begin, int64_t end) {
  run<GatedGradients>(b, b.forward, scratch, begin, end);
}

}  // namespace

const GatedAttentionKernels gated_attention_kernels = {forward_floats, forward, backward_floats, backward};

}  // namespace uz::UZ_ISA

// Attention, a tile of scores at a time. Floor: 2 (K + V) flops a pair of tokens, and 2 (3 K + 2 V) more for the
// gradients, on tiles held in registers with all operands in L1 and L2; then per pair one exponential (11 instructions
// a vector), and for dropout one of the 8 decisions of a Philox block. Pairs of different documents cost nothing.
#include "attention/backward.h"
#include "attention/forward.h"

namespace uz::UZ_ISA {
namespace {

template <class Pass, class Args>
int64_t floats(const Args& args) {
  Arena counter(nullptr);
  Pass(args, counter);
  return counter.used();
}

template <class Pass, class Args>
void run(const Args& args, float* scratch, int64_t begin, int64_t end) {
  Arena arena(scratch);
  Pass pass(args, arena);
  for (int64_t item = begin; item < end; ++item) pass.run(item);
}

}  // namespace

const AttentionKernels attention_kernels = {floats<AttentionForward, Attention>, run<AttentionForward, Attention>,
                                            floats<AttentionGradients, AttentionBackward>,
                                            run<AttentionGradients, AttentionBackward>};

}  // namespace uz::UZ_ISA

// The functions of csrc/common/simd.h over arrays, for test_simd.py.
#include "common/simd.h"

namespace uz::UZ_ISA {
namespace {

template <class In, class Out, class F>
void map(const In* in, Out* out, int64_t n, const F& f) {
  for_vectors(0, n, [&](int64_t i, auto... count) { store(out + i, f(load(in + i, count...)), count...); });
}

}  // namespace
}  // namespace uz::UZ_ISA

#define UZ_PROBE(NAME, IN, OUT, EXPRESSION)                                                        \
  extern "C" __attribute__((visibility("default"))) void NAME(const IN* in, OUT* out, int64_t n) { \
    using namespace uz::UZ_ISA;                                                                    \
    map(in, out, n, [](Vec x) { return EXPRESSION; });                                             \
  }

UZ_PROBE(probe_exp, float, float, uz::UZ_ISA::exp(x))
UZ_PROBE(probe_log1p, float, float, uz::UZ_ISA::log1p(x))
UZ_PROBE(probe_sigmoid, float, float, sigmoid(x))
UZ_PROBE(probe_softplus, float, float, softplus(x))
UZ_PROBE(probe_round, float, float, uz::UZ_ISA::round(x))
UZ_PROBE(probe_reduce_add, float, float, set1(reduce_add(x)))
UZ_PROBE(probe_reduce_max, float, float, set1(reduce_max(x)))
UZ_PROBE(probe_select, float, float, select_gt(x, set1(0.5f), -x, uz::UZ_ISA::abs(x)))
UZ_PROBE(probe_min_max, float, float, min(set1(1.0f), max(set1(-1.0f), x)))
UZ_PROBE(probe_from_bfloat16, uz::bf16, float, x)
UZ_PROBE(probe_from_float16, uz::fp16, float, x)
UZ_PROBE(probe_to_bfloat16, float, uz::bf16, x)
UZ_PROBE(probe_to_float16, float, uz::fp16, x)

extern "C" __attribute__((visibility("default"))) int64_t probe_lanes() { return uz::UZ_ISA::kLanes; }

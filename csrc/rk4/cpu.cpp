#include "common/simd.h"
#include "rk4/kernels.h"

namespace uz::UZ_ISA {
namespace {

void combine(const Rk4Combine& a, int64_t begin, int64_t end) {
  visit(a.state, a.slope, [&]<class H, class K>(H, K) {
    const H* h = static_cast<const H*>(a.h);
    const K *k1 = static_cast<const K*>(a.k1), *k2 = static_cast<const K*>(a.k2);
    const K *k3 = static_cast<const K*>(a.k3), *k4 = static_cast<const K*>(a.k4);
    H* out = static_cast<H*>(a.out);
    const Vec sixth = set1(a.sixth), two = set1(2.0f);
    for_vectors(begin, end, [&](int64_t i, auto... n) {
      const Vec ends = load(k1 + i, n...) + load(k4 + i, n...);
      const Vec middle = load(k2 + i, n...) + load(k3 + i, n...);
      store(out + i, fma(sixth, fma(two, middle, ends), load(h + i, n...)), n...);
    });
  });
}

void stage(const Rk4Stage& a, int64_t begin, int64_t end) {
  visit(a.state, a.slope, [&]<class H, class K>(H, K) {
    const H* h = static_cast<const H*>(a.h);
    const K* k = static_cast<const K*>(a.k);
    H* out = static_cast<H*>(a.out);
    const Vec c = set1(a.c);
    for_vectors(begin, end,
                [&](int64_t i, auto... n) { store(out + i, fma(c, load(k + i, n...), load(h + i, n...)), n...); });
  });
}

}  // namespace

const Rk4Kernels rk4_kernels = {combine, stage};

}  // namespace uz::UZ_ISA

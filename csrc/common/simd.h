// Vec: kLanes floats in a register, whose width is that of UZ_ISA. For cpu.cpp files, which build.py compiles once for
// each instruction set; everything here lives in namespace uz::UZ_ISA, so that no code for a newer CPU can be taken
// for an older one when the compilations are linked together.
//
//   set1(x)                          every lane x
//   load(p), load(p, n)              fp32, bf16 or fp16 to fp32; with n: the first n < kLanes lanes, the others 0
//   store(p, a), store(p, a, n)      fp32 to fp32, bf16 or fp16, to nearest even
//   + - * /, fma(a, b, c)            a * b + c, rounded once (but on portable without the instruction)
//   fnma(a, b, c)                    c - a * b
//   min, max                         b where a lane is NaN
//   abs, sqrt, round                 round: to nearest even, |a| < 2^22
//   select_gt(a, b, x, y)            x where a > b, else y
//   scale_by_power_of_2(a, n)        a * 2^n, n integral in [-252, 128]
//   reduce_add, reduce_max           over the lanes, always in the same order
//   exp, log1p, sigmoid, softplus    below
//   for_vectors(begin, end, body)    body(i) for whole vectors of elements, then body(i, n) for the n that are left
//   visit(dtype, f)                  f(float{} | bf16{} | fp16{}); with two dtypes, f of both
#pragma once

#include <cstdint>

#include "common/types.h"

#if !defined(UZ_ISA)
#error "UZ_ISA and UZ_ISA_LEVEL come from build.py"
#elif UZ_ISA_LEVEL >= 2
#include "common/simd_avx512.h"
#elif UZ_ISA_LEVEL == 1
#include "common/simd_avx2.h"
#else
#include "common/simd_portable.h"
#endif

namespace uz::UZ_ISA {

// e^x, within 1 ulp, down to the subnormals; 0 below -104, inf above 88.8, NaN for NaN.
inline Vec exp(Vec x) {
  x = min(set1(89.0f), max(set1(-104.0f), x));
  const Vec n = round(x * set1(1.44269504f));
  Vec r = fnma(n, set1(0.693359375f), x);  // ln 2 in two parts, the first exact for every n
  r = fnma(n, set1(-2.12194440e-4f), r);
  Vec p = fma(set1(1.3814540e-3f), r, set1(8.3687451e-3f));  // (e^r - 1 - r) / r^2 on |r| <= ln 2 / 2, error 3e-9
  p = fma(p, r, set1(4.1668391e-2f));
  p = fma(p, r, set1(1.6666520e-1f));
  p = fma(p, r, set1(4.9999993e-1f));
  p = fma(p * r, r, r) + set1(1.0f);
  return scale_by_power_of_2(p, n);
}

// log(1 + x) for x in [0, 1], within 1.5 ulp.
inline Vec log1p(Vec x) {
  const Vec s = x / (x + set1(2.0f)), z = s * s;             // log(1 + x) = 2 artanh(s), and 2 s = x - s x
  Vec p = fma(set1(1.4012230e-1f), z, set1(1.3999570e-1f));  // (artanh(s) / s - 1) / s^2 on s <= 1 / 3, error 5e-9
  p = fma(p, z, set1(2.0010850e-1f));
  p = fma(p, z, set1(3.3333207e-1f));
  return fnma(s, fnma(z + z, p, x), x);
}

// 1 / (1 + e^-x), within 2.5 ulp where e^-x is finite, else 0.
inline Vec sigmoid(Vec x) { return set1(1.0f) / (set1(1.0f) + exp(-x)); }

// log(1 + e^x), within 1.5 ulp.
inline Vec softplus(Vec x) { return max(set1(0.0f), x) + log1p(exp(-abs(x))); }

template <class F>
inline void visit(DType dtype, const F& f) {
  switch (dtype) {
    case DType::fp32:
      return f(float{});
    case DType::bf16:
      return f(bf16{});
    case DType::fp16:
      return f(fp16{});
  }
}

template <class F>
inline void visit(DType first, DType second, const F& f) {
  visit(first, [&](auto a) { visit(second, [&](auto b) { f(a, b); }); });
}

template <class Body>
inline void for_vectors(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(i);
  if (i < end) body(i, end - i);
}

}  // namespace uz::UZ_ISA

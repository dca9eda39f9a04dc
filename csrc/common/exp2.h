// The exponential where it is most of the work (scan, attention): 2^x = 2^n T[j] 2^r with x = n + j / entries + r, T in
// a register. For cpu.cpp files.
#pragma once

#include "common/simd.h"

namespace uz::UZ_ISA {

// 2^x for finite x, within 1.5 ulp; 0 (on AVX2 a number below 1e-37) from -150 down, infinity from 128 up.
#if UZ_ISA_LEVEL >= 2
inline Vec exp2(Vec x) {
  const __m512 T = _mm512_setr_ps(1.0f, 1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f, 1.29683959f,
                                  1.35425556f, 1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f, 1.68179286f,
                                  1.75625217f, 1.83400810f, 1.91520655f);
  const Vec shift = set1(786432.0f);  // 1.5 * 2^19: the sum has room for sixteenths, and j in its last four bits
  const Vec shifted = x + shift, whole = shifted - shift, r = x - whole;
  const Vec scale = {_mm512_permutexvar_ps(_mm512_castps_si512(shifted.v), T)};
  const Vec p = fma(fma(set1(5.5505950e-2f), r, set1(2.4023429e-1f)), r, set1(6.9314720e-1f));  // error 2e-9
  return scale_by_power_of_2(fma(p, scale * r, scale), whole);  // the instruction takes the floor
}
#elif UZ_ISA_LEVEL == 1
inline Vec exp2(Vec x) {
  const __m256 T =
      _mm256_setr_ps(1.0f, 1.09050775f, 1.18920708f, 1.29683959f, 1.41421354f, 1.54221082f, 1.68179286f, 1.83400810f);
  const Vec shift = set1(1572864.0f);  // 1.5 * 2^20: the sum has room for eighths, and j in its last three bits
  x = min(set1(128.0f), max(set1(-125.0f), x));
  const Vec shifted = x + shift, r = x - (shifted - shift);
  const __m256i bits = _mm256_castps_si256(shifted.v);
  const Vec scale = {_mm256_permutevar8x32_ps(T, bits)};
  Vec p = fma(fma(set1(9.6191240e-3f), r, set1(5.5510614e-2f)), r, set1(2.4022650e-1f));  // error 1e-10
  p = fma(fma(p, r, set1(6.9314720e-1f)), scale * r, scale);
  const __m256i n = _mm256_slli_epi32(_mm256_srli_epi32(bits, 3), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), n))};
}
#else
inline Vec exp2(Vec x) {
  x = min(set1(128.0f), max(set1(-150.0f), x));
  const Vec n = round(x), r = x - n;
  Vec p = fma(set1(1.5353362e-4f), r, set1(1.3398875e-3f));
  p = fma(p, r, set1(9.6184374e-3f));
  p = fma(p, r, set1(5.5503325e-2f));
  p = fma(p, r, set1(2.4022648e-1f));
  p = fma(p, r, set1(6.9314720e-1f));
  return scale_by_power_of_2(fma(p, r, set1(1.0f)), n);
}
#endif

}  // namespace uz::UZ_ISA

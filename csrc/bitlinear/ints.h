// Ints: vectors of int32 sums, one for each row of (part of) a tile, and their dot products with packed codes.
#pragma once

#include "common/simd.h"

namespace uz::UZ_ISA {

// kInts rows of a tile at once; kTokens tokens times kWide rows of tiles fill the registers with sums.
#if UZ_ISA_LEVEL >= 2
inline constexpr int kInts = 16, kTokens = 12, kWide = 2;
struct Ints {
  __m512i v;
};
inline Ints zero() { return {_mm512_setzero_si512()}; }
inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints codes_of(Ints packed) { return {_mm512_and_si512(packed.v, _mm512_set1_epi8(3))}; }
inline Ints next_codes(Ints packed) { return {_mm512_srli_epi32(packed.v, 2)}; }
inline Ints load_packed(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Ints broadcast(int32_t four) { return {_mm512_set1_epi32(four)}; }
inline Ints dot(Ints sum, Ints codes, Ints four) {
#if UZ_ISA_LEVEL >= 3
  return {_mm512_dpbusd_epi32(sum.v, codes.v, four.v)};
#else
  const __m512i pairs = _mm512_maddubs_epi16(codes.v, four.v);
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#endif
}
inline Vec to_float(Ints x, int32_t less) {
  return {_mm512_cvtepi32_ps(_mm512_sub_epi32(x.v, _mm512_set1_epi32(less)))};
}
#elif UZ_ISA_LEVEL == 1
inline constexpr int kInts = 8, kTokens = 8, kWide = 1;
struct Ints {
  __m256i v;
};
inline Ints zero() { return {_mm256_setzero_si256()}; }
inline Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Ints codes_of(Ints packed) { return {_mm256_and_si256(packed.v, _mm256_set1_epi8(3))}; }
inline Ints next_codes(Ints packed) { return {_mm256_srli_epi32(packed.v, 2)}; }
inline Ints load_packed(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline Ints broadcast(int32_t four) { return {_mm256_set1_epi32(four)}; }
inline Ints dot(Ints sum, Ints codes, Ints four) {
  const __m256i pairs = _mm256_maddubs_epi16(codes.v, four.v);
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
inline Vec to_float(Ints x, int32_t less) {
  return {_mm256_cvtepi32_ps(_mm256_sub_epi32(x.v, _mm256_set1_epi32(less)))};
}
#else
inline constexpr int kInts = 4, kTokens = 4, kWide = 1;
struct Ints {
  int32_t v[4];
};
inline Ints zero() { return {{0, 0, 0, 0}}; }
inline Ints add(Ints a, Ints b) {
  for (int i = 0; i < 4; ++i) a.v[i] += b.v[i];
  return a;
}
inline Ints codes_of(Ints packed) {
  for (int i = 0; i < 4; ++i) packed.v[i] &= 0x03030303;
  return packed;
}
inline Ints next_codes(Ints packed) {
  for (int i = 0; i < 4; ++i) packed.v[i] >>= 2;
  return packed;
}
inline Ints load_packed(const uint8_t* p) {
  Ints x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
inline Ints broadcast(int32_t four) { return {{four, four, four, four}}; }
inline Ints dot(Ints sum, Ints codes, Ints four) {
  int8_t x[4];
  __builtin_memcpy(x, four.v, 4);
  for (int i = 0; i < 4; ++i) {
    uint8_t code[4];
    __builtin_memcpy(code, &codes.v[i], 4);
    sum.v[i] += code[0] * x[0] + code[1] * x[1] + code[2] * x[2] + code[3] * x[3];
  }
  return sum;
}
inline Vec to_float(Ints x, int32_t less) {
  float out[4];
  for (int i = 0; i < 4; ++i) out[i] = static_cast<float>(x.v[i] - less);
  return load(out);
}
#endif

static_assert(kInts == kLanes, "one vector of floats per vector of sums");

template <class P>
inline Vec load_some(const P* p, int64_t left) {
  return left >= kLanes ? load(p) : load(p, left);
}
template <class P>
inline void store_some(P* p, Vec x, int64_t left) {
  if (left >= kLanes) return store(p, x);
  store(p, x, left);
}

}  // namespace uz::UZ_ISA

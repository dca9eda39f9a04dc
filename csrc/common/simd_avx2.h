// Vec: 8 floats in a ymm register. Included by simd.h alone.
#include <immintrin.h>

#include <cstring>

namespace uz::UZ_ISA {

struct Vec {
  __m256 v;
};

inline constexpr int64_t kLanes = 8;

inline __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec operator-(Vec a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))}; }

inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec select_gt(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))};
}

inline __m256 power_of_2(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

inline Vec scale_by_power_of_2(Vec a, Vec n) {  // in two steps, so that subnormal results and 2^128 come out
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, power_of_2(half)), power_of_2(_mm256_sub_epi32(whole, half)))};
}

inline float reduce_add(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

inline float reduce_max(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

inline __m256 widen_bf16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }

inline __m128i narrow_bf16(__m256 x) {  // to nearest, ties to even; a NaN stays a NaN
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}

inline __m128i load_8x16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

inline __m128i load_8x16(const void* p, int64_t n) {
  __m128i x = _mm_setzero_si128();
  std::memcpy(&x, p, static_cast<size_t>(n) * 2);
  return x;
}

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const bf16* p) { return {widen_bf16(load_8x16(p))}; }
inline Vec load(const fp16* p) { return {_mm256_cvtph_ps(load_8x16(p))}; }

inline Vec load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
inline Vec load(const bf16* p, int64_t n) { return {widen_bf16(load_8x16(p, n))}; }
inline Vec load(const fp16* p, int64_t n) { return {_mm256_cvtph_ps(load_8x16(p, n))}; }

inline __m128i narrow_fp16(Vec a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(bf16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(a.v)); }
inline void store(fp16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_fp16(a)); }

inline void store(float* p, Vec a, int64_t n) { _mm256_maskstore_ps(p, first(n), a.v); }
inline void store(bf16* p, Vec a, int64_t n) {
  const __m128i x = narrow_bf16(a.v);
  std::memcpy(p, &x, static_cast<size_t>(n) * 2);
}
inline void store(fp16* p, Vec a, int64_t n) {
  const __m128i x = narrow_fp16(a);
  std::memcpy(p, &x, static_cast<size_t>(n) * 2);
}

}  // namespace uz::UZ_ISA

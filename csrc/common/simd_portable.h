// Vec: 4 floats in the compiler's own vector type (SSE2, NEON, or plain code). Included by simd.h alone.
#include <cstring>

namespace uz::UZ_ISA {

typedef float float4 __attribute__((vector_size(16)));
typedef int32_t int4 __attribute__((vector_size(16)));

struct Vec {
  float4 v;
};

inline constexpr int64_t kLanes = 4;

inline int4 bits_of(float4 x) { return reinterpret_cast<int4>(x); }
inline float4 floats_of(int4 x) { return reinterpret_cast<float4>(x); }
inline float4 pick(int4 mask, float4 x, float4 y) { return floats_of((bits_of(x) & mask) | (bits_of(y) & ~mask)); }

inline Vec set1(float x) { return {float4{x, x, x, x}}; }

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec operator-(Vec a) { return {-a.v}; }

inline Vec fma(Vec a, Vec b, Vec c) {  // rounded once only where the machine has the instruction
#if defined(__FP_FAST_FMAF)
  for (int i = 0; i < 4; ++i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
#else
  return {a.v * b.v + c.v};
#endif
}
inline Vec fnma(Vec a, Vec b, Vec c) { return fma(-a, b, c); }
inline Vec min(Vec a, Vec b) { return {pick(a.v < b.v, a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {pick(a.v > b.v, a.v, b.v)}; }
inline Vec abs(Vec a) { return {floats_of(bits_of(a.v) & 0x7fffffff)}; }
inline Vec sqrt(Vec a) {
  for (int i = 0; i < 4; ++i) a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
inline Vec round(Vec a) {                    // |a| < 2^22
  const float4 shift = set1(12582912.0f).v;  // 1.5 * 2^23: the sum has no room for a fraction
  return {(a.v + shift) - shift};
}
inline Vec select_gt(Vec a, Vec b, Vec x, Vec y) { return {pick(a.v > b.v, x.v, y.v)}; }

inline Vec scale_by_power_of_2(Vec a, Vec n) {  // in two steps, so that subnormal results and 2^128 come out
  const int4 whole = __builtin_convertvector(n.v, int4);
  const int4 half = whole >> 1;
  return {a.v * floats_of((half + 127) << 23) * floats_of((whole - half + 127) << 23)};
}

inline float reduce_add(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float reduce_max(Vec a) {
  const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1], y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return x > y ? x : y;
}

inline float widen(float x) { return x; }

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float widen(bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

inline float widen(fp16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f));  // 127 - 15: the two exponent biases
}

inline void narrow(float x, float* p) { *p = x; }

inline void narrow(float x, bf16* p) {  // to nearest, ties to even; a NaN stays a NaN
  const uint32_t bits = to_bits(x);
  p->bits = static_cast<uint16_t>((x != x ? bits | 0x00400000u : bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline void narrow(float x, fp16* p) {  // to nearest, ties to even; a NaN stays a NaN
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520, which rounds past the largest
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // 2^-14, below which halves are subnormal, spaced like floats near 0.5
    half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | half);
}

template <class T>
inline Vec load(const T* p, int64_t n) {
  Vec a = set1(0.0f);
  for (int64_t i = 0; i < n; ++i) a.v[i] = widen(p[i]);
  return a;
}

template <class T>
inline Vec load(const T* p) {
  return {float4{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}};
}

inline Vec load(const float* p) {
  Vec a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}

template <class T>
inline void store(T* p, Vec a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(a.v[i], p + i);
}

template <class T>
inline void store(T* p, Vec a) {
  store(p, a, kLanes);
}

inline void store(float* p, Vec a) { std::memcpy(p, &a, sizeof(a)); }

}  // namespace uz::UZ_ISA

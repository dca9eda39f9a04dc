// __half: storage, and conversions that round to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __half_raw {
  unsigned short x;
};

struct alignas(2) __half {
  unsigned short bits;
  __half() = default;
  constexpr __half(__half_raw raw) : bits(raw.x) {}
  operator __half_raw() const { return {bits}; }
};
using half = __half;

struct alignas(4) __half2 {
  __half x, y;
};
using half2 = __half2;

inline __half __ushort_as_half(unsigned short bits) { return __half_raw{bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
  const unsigned sign = static_cast<unsigned>(x.bits & 0x8000) << 16;
  const unsigned exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent > 0) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = std::ldexp(static_cast<float>(fraction), -24);
  return sign ? -magnitude : magnitude;
}

inline __half __float2half(float x) {
  const unsigned all = __float_as_uint(x), sign = all >> 16 & 0x8000u, magnitude = all & 0x7fffffffu;
  unsigned bits;
  if (magnitude > 0x7f800000u) {
    return __ushort_as_half(0x7fff);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more
    bits = 0x7c00;
  } else if (magnitude >= 0x38800000u) {  // normal: 13 bits go
    bits = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  } else {  // a multiple of 2^-24: adding 1/2 rounds there
    bits = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
  }
  return __ushort_as_half(static_cast<unsigned short>(sign | bits));
}
inline __half __float2half_rn(float x) { return __float2half(x); }

inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline float __low2float(__half2 v) { return __half2float(v.x); }
inline float __high2float(__half2 v) { return __half2float(v.y); }

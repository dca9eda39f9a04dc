// CUDA's vector types, with the alignment that they have on the device.
#pragma once

#include "../simt.h"

#define SIMT_VECTORS(NAME, T, TWO, FOUR)                                \
  struct NAME##1 { T x; };                                              \
  struct alignas(TWO) NAME##2 { T x, y; };                              \
  struct NAME##3 { T x, y, z; };                                        \
  struct alignas(FOUR) NAME##4 { T x, y, z, w; };                       \
  constexpr NAME##1 make_##NAME##1(T x) { return {x}; }                 \
  constexpr NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }         \
  constexpr NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; } \
  constexpr NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }

#define uint3 simt_uint3  // simt.h has it
SIMT_VECTORS(uint, unsigned, 8, 16)
#undef uint3
SIMT_VECTORS(char, signed char, 2, 4)
SIMT_VECTORS(uchar, unsigned char, 2, 4)
SIMT_VECTORS(short, short, 4, 8)
SIMT_VECTORS(ushort, unsigned short, 4, 8)
SIMT_VECTORS(int, int, 8, 16)
SIMT_VECTORS(longlong, long long, 16, 16)
SIMT_VECTORS(ulonglong, unsigned long long, 16, 16)
SIMT_VECTORS(float, float, 8, 16)
SIMT_VECTORS(double, double, 16, 16)
#undef SIMT_VECTORS

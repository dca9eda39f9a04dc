// Tensor cores, for inputs of 16 bits from sm_80 on. Products of two inputs take them as they are: mma.m16n8k16, exact
// but for its sums, which align the addends and cut off what is below. A product with scores or a state, which are fp32
// and may be beyond 65504, takes both sides in tf32: the fp32 side is rounded to 11 bits, the input is exact. As many
// mma as two parts of 16 bits would take, for either dtype.
//
// A warp holds a product in pieces of 16 rows by 8 columns: lane 4 g + t has rows g, g, g + 8, g + 8 and columns
// 2 t, 2 t + 1, 2 t, 2 t + 1 of it. What is summed over comes in any order, as long as both sides agree: tf32 takes
// numbers 2 t and 2 t + 1 of eight where its own order has t and t + 4, so that a piece of scores is a left side as it
// is, and two neighbours of 16 bits, of a row or of a column, come as one word.
#pragma once

#include "retention/tile.cuh"

// UZ_SIMT_MMA: the emulator takes this path too, with mma's sums done by shuffles.
#if (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800) || defined(UZ_SIMT_MMA)
#define UZ_RETENTION_MMA 1
#else
#define UZ_RETENTION_MMA 0
#endif

namespace uz::cuda {
namespace {

// Whether this code is for tensor cores. Launchers do not know: it is false in what is compiled for the host.
template <class T>
constexpr bool kTensorCores = UZ_RETENTION_MMA && sizeof(T) == 2;

// From one row of 64 numbers in shared memory to the next, so that the lanes of a warp meet in no bank.
constexpr int kRow = kTile + 8;          // of 16 bits: 16 bytes of each of 8 rows
constexpr int kFloatRow = kTile + 4;     // fp32: lane 4 g + t has row 2 t, number g
constexpr int kTurnedRow = kTile + 8;    // fp32: row g, numbers 2 t and 2 t + 1
constexpr int kRowsSize = kTile * kRow;  // 64 rows of 16 bits

using Bits = unsigned short;  // a number of 16 bits of either dtype

template <class T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<__nv_bfloat16> = true;

// The place of a lane in a piece.
struct Lane {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
};

// Two numbers of 16 bits, the lower half first.
template <class T>
__device__ __forceinline__ float2 wide(unsigned pair);
template <>
__device__ __forceinline__ float2 wide<__nv_bfloat16>(unsigned pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 wide<__half>(unsigned pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// The bits of x rounded to tf32.
__device__ __forceinline__ unsigned to_tf32(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  const unsigned bits = __float_as_uint(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
#endif
}

#if UZ_RETENTION_MMA && !defined(__CUDA_ARCH__)
// What mma does, by shuffles: f(sum, left, right) adds the product of what a lane has of a row and of a column.
template <class F>
void emulate(float (&sum)[4], const unsigned (&left)[4], unsigned right0, unsigned right1, const F& f) {
  const auto both = [](unsigned a, unsigned b) { return static_cast<unsigned long long>(b) << 32 | a; };
  const unsigned long long rows[2] = {both(left[0], left[2]), both(left[1], left[3])}, column = both(right0, right1);
  const Lane lane;
  for (int k = 0; k < 4; ++k) {
    unsigned long long row[2];
    for (int i = 0; i < 2; ++i) row[i] = __shfl_sync(kAllLanes, rows[i], 4 * lane.g + k);
    for (int j = 0; j < 2; ++j) {
      const unsigned long long other = __shfl_sync(kAllLanes, column, 4 * (2 * lane.t + j) + k);
      for (int i = 0; i < 2; ++i)
        for (int half = 0; half < 64; half += 32)
          f(sum[2 * i + j], static_cast<unsigned>(row[i] >> half), static_cast<unsigned>(other >> half));
    }
  }
}
#endif

// sum (16, 8) += left (16, 8) right (8, 8) in tf32, a warp together. Lane 4 g + t has rows g, g + 8, g, g + 8 of left
// and column g of right, at numbers 2 t, 2 t, 2 t + 1, 2 t + 1 and 2 t, 2 t + 1 of the eight.
__device__ __forceinline__ void mma(float (&sum)[4], const unsigned (&left)[4], unsigned right0, unsigned right1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
#elif UZ_RETENTION_MMA
  emulate(sum, left, right0, right1, [](float& s, unsigned x, unsigned y) {
    s = fmaf(__uint_as_float(x & 0xffffe000u), __uint_as_float(y & 0xffffe000u), s);
  });
#endif
}

// The same of 16 numbers of 16 bits: a word has two neighbours, and the second half is words 2, 3 of left, 1 of right.
template <class T>
__device__ __forceinline__ void mma16(float (&sum)[4], const unsigned (&left)[4], unsigned right0, unsigned right1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (kIsBf16<T>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
  }
#elif UZ_RETENTION_MMA
  emulate(sum, left, right0, right1, [](float& s, unsigned x, unsigned y) {
    const float2 a = wide<T>(x), b = wide<T>(y);
    s = fmaf(a.y, b.y, fmaf(a.x, b.x, s));
  });
#endif
}

// Four words of a lane, from four 8 x 8 pieces of 16-bit rows in shared memory: piece i begins at
// from + i % 2 * one + i / 2 * two. Lane 4 g + t gets numbers 2 t and 2 t + 1 of row g, or, turned, of column g.
template <bool kTurned>
__device__ __forceinline__ void load_pieces(unsigned (&to)[4], const Bits* from, int one, int two) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const int lane = threadIdx.x % kWarp;
  const unsigned address =
      static_cast<unsigned>(__cvta_generic_to_shared(from + (lane / 8 % 2 * one + lane / 16 * two + lane % 8 * kRow)));
  if constexpr (kTurned) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  }
#else
  const Lane lane;
  for (int i = 0; i < 4; ++i) {
    const Bits* const piece = from + (i % 2 * one + i / 2 * two);
    const int first = kTurned ? 2 * lane.t * kRow + lane.g : lane.g * kRow + 2 * lane.t;
    to[i] = piece[first] | static_cast<unsigned>(piece[first + (kTurned ? kRow : 1)]) << 16;
  }
#endif
}

// The thread, from a shuffle: known beforehand, addresses would fill registers all along.
__device__ __forceinline__ int thread_now() {
  return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x), threadIdx.x % kWarp);
}

// *to = *from, or zeros; 16 or 4 bytes are there after wait_for_copies, 2 at once.
template <class V>
__device__ __forceinline__ void copy(V* to, const V* from, bool here) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (sizeof(V) == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(address), "l"(from), "r"(here ? 16 : 0)
                 : "memory");
    return;
  } else if constexpr (sizeof(V) == 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :
                 : "r"(address), "l"(from), "r"(here ? 4 : 0)
                 : "memory");
    return;
  }
#endif
  *to = here ? *from : V();
}

__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" : : : "memory");
#endif
}

// 64 rows of x from row `row` on, 64 columns from `column` on, to shared memory; 0 but for rows first .. last - 1 of x
// and for its columns. V: as much as is aligned. There after wait_for_copies.
template <class V, class T>
__device__ __forceinline__ void copy_rows_by(Bits* to, const Matrix<T>& x, int row, int column, int first, int last) {
  constexpr int kEach = sizeof(V) / sizeof(T), kAcross = kTile / kEach;
  const int thread = thread_now(), c = thread % kAcross * kEach;
#pragma unroll 4
  for (int i = thread / kAcross; i < kTile; i += kThreads / kAcross) {
    const bool here = row + i >= first && row + i < last && column + c < x.columns;
    const T* const from = here ? x.data + ((row + i) * x.stride + column + c) : x.data;
    copy(reinterpret_cast<V*>(to + i * kRow + c), reinterpret_cast<const V*>(from), here);
  }
}

template <class T>
__device__ __forceinline__ void copy_rows(Bits* to, const Matrix<T>& x, int row, int column, int first, int last) {
  const auto address = reinterpret_cast<uintptr_t>(x.data);
  if (x.columns % 8 == 0 && address % 16 == 0) {
    copy_rows_by<uint4>(to, x, row, column, first, last);
  } else if (x.columns % 2 == 0 && address % 4 == 0) {
    copy_rows_by<unsigned>(to, x, row, column, first, last);
  } else {
    copy_rows_by<Bits>(to, x, row, column, first, last);
  }
}

}  // namespace
}  // namespace uz::cuda

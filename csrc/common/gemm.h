// Products of small matrices that lie in cache, for cpu.cpp files. Leading
// dimensions of B and C are multiples of kLanes and the memory up to them is
// there, so no product needs a mask; what stands between the last column and
// the leading dimension of B reaches only the same columns of C.
#pragma once

#include "common/arena.h"
#include "common/simd.h"

namespace uz::UZ_ISA {

// Registers of one tile: kTileRows x kTileVecs sums, kTileVecs of B and one of
// A.
inline constexpr int kTileRows = 6;
inline constexpr int kTileVecs = UZ_ISA_LEVEL >= 2 ? 4 : 2;

struct Matrix {  // element (i, k) at data[i * row + k * col]
  const float* data;
  int64_t row, col;
};

struct Nothing {
  void operator()() const {}
};

template <int kRows, int kVecs, bool kAdd>
inline void tile(Matrix a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth) {
  Vec sum[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) sum[i][j] = kAdd ? load(c + i * ldc + j * kLanes) : set1(0.0f);
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[kVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) row[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec x = set1(a.data[i * a.row + k * a.col]);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) sum[i][j] = fma(x, row[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) store(c + i * ldc + j * kLanes, sum[i][j]);
}

template <int kVecs, bool kAdd, class Hook>
inline void tile_column(Matrix a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t depth,
                        Hook& before_tile) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    before_tile();
    tile<kTileRows, kVecs, kAdd>({a.data + i * a.row, a.row, a.col}, b, ldb, c + i * ldc, ldc, depth);
  }
  const Matrix rest = {a.data + i * a.row, a.row, a.col};
  switch (rows - i) {
    case 5:
      return tile<5, kVecs, kAdd>(rest, b, ldb, c + i * ldc, ldc, depth);
    case 4:
      return tile<4, kVecs, kAdd>(rest, b, ldb, c + i * ldc, ldc, depth);
    case 3:
      return tile<3, kVecs, kAdd>(rest, b, ldb, c + i * ldc, ldc, depth);
    case 2:
      return tile<2, kVecs, kAdd>(rest, b, ldb, c + i * ldc, ldc, depth);
    case 1:
      return tile<1, kVecs, kAdd>(rest, b, ldb, c + i * ldc, ldc, depth);
    default:
      return;
  }
}

// C = A B, or C += A B: A (rows, depth), B (depth, columns), C (rows, columns);
// columns are rounded up to kLanes. before_tile() is called in between: to
// prefetch.
template <bool kAdd, class Hook>
void gemm(Matrix a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t columns, int64_t depth,
          Hook&& before_tile) {
  const int64_t vecs = round_up(columns, kLanes) / kLanes;
  int64_t j = 0;
  for (; j + kTileVecs <= vecs; j += kTileVecs)
    tile_column<kTileVecs, kAdd>(a, b + j * kLanes, ldb, c + j * kLanes, ldc, rows, depth, before_tile);
  b += j * kLanes, c += j * kLanes;
  switch (vecs - j) {
    case 3:
      if constexpr (kTileVecs > 3) return tile_column<3, kAdd>(a, b, ldb, c, ldc, rows, depth, before_tile);
      [[fallthrough]];
    case 2:
      if constexpr (kTileVecs > 2) return tile_column<2, kAdd>(a, b, ldb, c, ldc, rows, depth, before_tile);
      [[fallthrough]];
    case 1:
      return tile_column<1, kAdd>(a, b, ldb, c, ldc, rows, depth, before_tile);
    default:
      return;
  }
}

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

template <int i, int j, int k, int l>
inline Four pick(Four a, Four b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, i, j, k, l);
#else
  typedef int32_t Places __attribute__((vector_size(16)));
  return __builtin_shuffle(a, b, Places{i, j, k, l});
#endif
}

// out (columns, rows) = x (rows, columns) transposed; rows and columns are
// rounded up to 4.
inline void transpose(const float* x, int64_t ldx, float* out, int64_t ldo, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += 4) {
    for (int64_t j = 0; j < columns; j += 4) {
      const float* p = x + i * ldx + j;
      const Four a = *reinterpret_cast<const Four*>(p), b = *reinterpret_cast<const Four*>(p + ldx);
      const Four c = *reinterpret_cast<const Four*>(p + 2 * ldx), d = *reinterpret_cast<const Four*>(p + 3 * ldx);
      const Four ab = pick<0, 4, 1, 5>(a, b), ab2 = pick<2, 6, 3, 7>(a, b);
      const Four cd = pick<0, 4, 1, 5>(c, d), cd2 = pick<2, 6, 3, 7>(c, d);
      float* q = out + j * ldo + i;
      *reinterpret_cast<Four*>(q) = pick<0, 1, 4, 5>(ab, cd);
      *reinterpret_cast<Four*>(q + ldo) = pick<2, 3, 6, 7>(ab, cd);
      *reinterpret_cast<Four*>(q + 2 * ldo) = pick<0, 1, 4, 5>(ab2, cd2);
      *reinterpret_cast<Four*>(q + 3 * ldo) = pick<2, 3, 6, 7>(ab2, cd2);
    }
  }
}

}  // namespace uz::UZ_ISA

// The product of packed codes and int8 tokens, in tiles held in registers.
#pragma once

#include "bitlinear/ints.h"
#include "bitlinear/kernels.h"

namespace uz::UZ_ISA {

inline Ints four_at(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return broadcast(four);
}

template <int kRows, int kCount>
struct Sums {
  Ints of[kRows][kCount];
};

// Sums of kCount tokens with kInts rows of each of kRows rows of tiles, which lie row_bytes apart.
template <int kRows, int kCount>
inline Sums<kRows, kCount> dot_rows(const uint8_t* tiles, int64_t row_bytes, int64_t column_tiles, const int8_t* x,
                                    int64_t stride) {
  Ints sum[kRows][kCount];
#pragma GCC unroll 2
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
    for (int t = 0; t < kCount; ++t) sum[row][t] = zero();
  for (int64_t j = 0; j < column_tiles; ++j, tiles += kTileBytes) {
    Ints packed[kRows];
#pragma GCC unroll 2
    for (int row = 0; row < kRows; ++row) packed[row] = load_packed(tiles + row * row_bytes);
    for (const int8_t* end = x + kTile; x < end; x += 4) {
      Ints code[kRows];
#pragma GCC unroll 2
      for (int row = 0; row < kRows; ++row) code[row] = codes_of(packed[row]), packed[row] = next_codes(packed[row]);
#pragma GCC unroll 16
      for (int t = 0; t < kCount; ++t) {
        const Ints four = four_at(x + t * stride);
#pragma GCC unroll 2
        for (int row = 0; row < kRows; ++row) sum[row][t] = dot(sum[row][t], code[row], four);
      }
    }
  }
  Sums<kRows, kCount> sums;
#pragma GCC unroll 2
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
    for (int t = 0; t < kCount; ++t) sums.of[row][t] = sum[row][t];
  return sums;
}

// One token and one row of tiles: independent sums for the four groups of columns, lest each waits for the one before.
inline Ints dot_row(const uint8_t* tiles, int64_t column_tiles, const int8_t* x) {
  Ints part[4] = {zero(), zero(), zero(), zero()};
  for (int64_t j = 0; j < column_tiles; ++j, tiles += kTileBytes, x += kTile) {
    Ints packed = load_packed(tiles);
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s)
      part[s] = dot(part[s], codes_of(packed), four_at(x + 4 * s)), packed = next_codes(packed);
  }
  return add(add(part[0], part[1]), add(part[2], part[3]));
}

template <class T, class P, int kRows, int kCount>
void product_tokens(const PackedProduct& a, int64_t token, int64_t first_row) {
  const int64_t column_tiles = (a.columns + kTile - 1) / kTile, row_bytes = column_tiles * kTileBytes;
  const uint8_t* tiles = a.packed + first_row / kTile * row_bytes;
  const int8_t* x = a.integers + token * a.stride;
  for (int64_t part = 0; part < kTile; part += kInts) {
    Sums<kRows, kCount> sums;
    if constexpr (kCount == 1) {
      for (int row = 0; row < kRows; ++row)
        sums.of[row][0] = dot_row(tiles + row * row_bytes + part * 4, column_tiles, x);
    } else {
      sums = dot_rows<kRows, kCount>(tiles + part * 4, row_bytes, column_tiles, x, a.stride);
    }
    for (int row = 0; row < kRows; ++row) {
      const int64_t at = first_row + row * kTile + part, left = a.rows - at;
      if (left <= 0) break;
      const Vec scale = a.row_scale != nullptr ? load_some(a.row_scale + at, left) : set1(a.one_scale);
      const Vec bias = a.bias != nullptr ? load_some(static_cast<const P*>(a.bias) + at, left) : set1(0.0f);
      for (int t = 0; t < kCount; ++t) {
        const Vec y = to_float(sums.of[row][t], a.token_sum[token + t]) * (set1(a.token_scale[token + t]) * scale);
        store_some(static_cast<T*>(a.y) + (token + t) * a.rows + at, y + bias, left);
      }
    }
  }
}

// Tokens [token, last) with kRows rows of tiles.
template <class T, class P, int kRows>
void product_rows(const PackedProduct& a, int64_t token, int64_t last, int64_t row) {
  while (last - token >= kTokens) product_tokens<T, P, kRows, kTokens>(a, token, row), token += kTokens;
  if constexpr (kTokens > 8)
    if (last - token >= 8) product_tokens<T, P, kRows, 8>(a, token, row), token += 8;
  if constexpr (kTokens > 4)
    if (last - token >= 4) product_tokens<T, P, kRows, 4>(a, token, row), token += 4;
  if (last - token >= 2) product_tokens<T, P, kRows, 2>(a, token, row), token += 2;
  if (last - token >= 1) product_tokens<T, P, kRows, 1>(a, token, row);
}

// One item: a panel of tokens, which stays in L2, with kTileRows rows of tiles; kWide of them at once stay in L1.
template <class T, class P>
void product_item(const PackedProduct& a, int64_t item) {
  const int64_t group_rows = kTileRows * kTile, groups = (a.rows + group_rows - 1) / group_rows;
  const int64_t token = item / groups * kTokenPanel, first = item % groups * group_rows;
  const int64_t last = token + kTokenPanel < a.tokens ? token + kTokenPanel : a.tokens;
  const int64_t rows = first + group_rows < a.rows ? first + group_rows : a.rows;
  int64_t row = first;
  for (; row + (kWide - 1) * kTile < rows; row += kWide * kTile) product_rows<T, P, kWide>(a, token, last, row);
  for (; row < rows; row += kTile) product_rows<T, P, 1>(a, token, last, row);
}

}  // namespace uz::UZ_ISA

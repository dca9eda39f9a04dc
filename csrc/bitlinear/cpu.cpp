// Packed products. A tile (16 rows, 16 columns) is 64 bytes; shifted by 0, 2, 4, 6 and masked it yields four groups of
// four columns for all 16 rows, each of which is one dot-product instruction per token (VNNI; maddubs + madd without).
// Codes are stored as 0, 1, 2 for -1, 0, 1, so the sum of the token's integers is taken off at the end. Sums are exact:
// maddubs pairs are at most 2 * 2 * 127 = 508, int32 overflows beyond 8 million columns.
// Floor at one token: the weight's bytes (a quarter byte each); beyond about 8 tokens the dot-product rate, 11 other
// instructions per 64 at kTokenBlock tokens. Tokens of a block (kTokenBlock x K bytes) stay in L1, a group of tile rows
// in L2.
#include "bitlinear/kernels.h"
#include "common/simd.h"

namespace uz::UZ_ISA {
namespace {

// Ints: kInts rows of a tile, one int32 sum each.
#if UZ_ISA_LEVEL >= 2
constexpr int kInts = 16;
constexpr int kTokens = 16;
struct Ints {
  __m512i v;
};
inline Ints zero() { return {_mm512_setzero_si512()}; }
inline Ints codes_at(Ints packed, int shift) {
  return {_mm512_and_si512(_mm512_srl_epi32(packed.v, _mm_cvtsi32_si128(shift)), _mm512_set1_epi8(3))};
}
inline Ints load_packed(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Ints dot(Ints sum, Ints codes, int32_t four) {
#if UZ_ISA_LEVEL >= 3
  return {_mm512_dpbusd_epi32(sum.v, codes.v, _mm512_set1_epi32(four))};
#else
  const __m512i pairs = _mm512_maddubs_epi16(codes.v, _mm512_set1_epi32(four));
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#endif
}
inline Vec to_float(Ints x, int32_t less, int) {
  return {_mm512_cvtepi32_ps(_mm512_sub_epi32(x.v, _mm512_set1_epi32(less)))};
}
#elif UZ_ISA_LEVEL == 1
constexpr int kInts = 8;
constexpr int kTokens = 8;
struct Ints {
  __m256i v;
};
inline Ints zero() { return {_mm256_setzero_si256()}; }
inline Ints codes_at(Ints packed, int shift) {
  return {_mm256_and_si256(_mm256_srl_epi32(packed.v, _mm_cvtsi32_si128(shift)), _mm256_set1_epi8(3))};
}
inline Ints load_packed(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline Ints dot(Ints sum, Ints codes, int32_t four) {
  const __m256i pairs = _mm256_maddubs_epi16(codes.v, _mm256_set1_epi32(four));
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
inline Vec to_float(Ints x, int32_t less, int) {
  return {_mm256_cvtepi32_ps(_mm256_sub_epi32(x.v, _mm256_set1_epi32(less)))};
}
#else
constexpr int kInts = 4;
constexpr int kTokens = 4;
struct Ints {
  int32_t v[4];
};
inline Ints zero() { return {{0, 0, 0, 0}}; }
inline Ints codes_at(Ints packed, int shift) {
  for (int i = 0; i < 4; ++i) packed.v[i] = (packed.v[i] >> shift) & 0x03030303;
  return packed;
}
inline Ints load_packed(const uint8_t* p) {
  Ints x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
inline Ints dot(Ints sum, Ints codes, int32_t four) {
  int8_t x[4];
  __builtin_memcpy(x, &four, 4);
  for (int i = 0; i < 4; ++i) {
    uint8_t code[4];
    __builtin_memcpy(code, &codes.v[i], 4);
    sum.v[i] += code[0] * x[0] + code[1] * x[1] + code[2] * x[2] + code[3] * x[3];
  }
  return sum;
}
inline Vec to_float(Ints x, int32_t less, int) {
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

inline int32_t four_at(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return four;
}

// Sums of kCount tokens with kInts rows of one row of tiles.
template <int kCount>
inline void dot_rows(const uint8_t* tiles, int64_t column_tiles, const int8_t* x, int64_t stride, Ints* sum) {
#pragma GCC unroll 16
  for (int t = 0; t < kCount; ++t) sum[t] = zero();
  for (int64_t j = 0; j < column_tiles; ++j, tiles += 64, x += kTile) {
    const Ints packed = load_packed(tiles);
    const Ints code[4] = {codes_at(packed, 0), codes_at(packed, 2), codes_at(packed, 4), codes_at(packed, 6)};
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s)
#pragma GCC unroll 16
      for (int t = 0; t < kCount; ++t) sum[t] = dot(sum[t], code[s], four_at(x + t * stride + 4 * s));
  }
}

// One token: independent sums for the four groups of columns, lest each waits for the one before.
template <>
inline void dot_rows<1>(const uint8_t* tiles, int64_t column_tiles, const int8_t* x, int64_t, Ints* sum) {
  Ints part[4] = {zero(), zero(), zero(), zero()};
  for (int64_t j = 0; j < column_tiles; ++j, tiles += 64, x += kTile) {
    const Ints packed = load_packed(tiles);
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) part[s] = dot(part[s], codes_at(packed, 2 * s), four_at(x + 4 * s));
  }
  sum[0] = part[0];
  for (int s = 1; s < 4; ++s) {
#if UZ_ISA_LEVEL >= 2
    sum[0].v = _mm512_add_epi32(sum[0].v, part[s].v);
#elif UZ_ISA_LEVEL == 1
    sum[0].v = _mm256_add_epi32(sum[0].v, part[s].v);
#else
    for (int i = 0; i < 4; ++i) sum[0].v[i] += part[s].v[i];
#endif
  }
}

template <class T, class P, int kCount>
void product_tokens(const PackedProduct& a, int64_t token, int64_t first_row) {
  const int64_t column_tiles = (a.columns + kTile - 1) / kTile;
  const uint8_t* tiles = a.packed + first_row / kTile * column_tiles * 64;
  for (int part = 0; part < kTile / kInts; ++part) {
    const int64_t row = first_row + part * kInts, left = a.rows - row;
    if (left <= 0) return;
    Ints sum[kCount];
    dot_rows<kCount>(tiles + part * kInts * 4, column_tiles, a.integers + token * a.stride, a.stride, sum);
    const Vec scale = a.row_scale != nullptr ? load_some(a.row_scale + row, left) : set1(a.one_scale);
    const Vec bias = a.bias != nullptr ? load_some(static_cast<const P*>(a.bias) + row, left) : set1(0.0f);
    for (int t = 0; t < kCount; ++t) {
      const Vec y = to_float(sum[t], a.token_sum[token + t], 0) * (set1(a.token_scale[token + t]) * scale);
      store_some(static_cast<T*>(a.y) + (token + t) * a.rows + row, y + bias, left);
    }
  }
}

template <class T, class P>
void product_block(const PackedProduct& a, int64_t token, int64_t last, int64_t row) {
  while (last - token >= kTokens) product_tokens<T, P, kTokens>(a, token, row), token += kTokens;
  if constexpr (kTokens > 8)
    if (last - token >= 8) product_tokens<T, P, 8>(a, token, row), token += 8;
  if constexpr (kTokens > 4)
    if (last - token >= 4) product_tokens<T, P, 4>(a, token, row), token += 4;
  if (last - token >= 2) product_tokens<T, P, 2>(a, token, row), token += 2;
  if (last - token >= 1) product_tokens<T, P, 1>(a, token, row);
}

void product(const PackedProduct& a, int64_t begin, int64_t end) {
  const int64_t group_rows = kTileRows * kTile, groups = (a.rows + group_rows - 1) / group_rows;
  visit(a.dtype, [&]<class T>(T) {
    visit(a.bias_dtype, [&]<class P>(P) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t token = item / groups * kTokenBlock, first = item % groups * group_rows;
        const int64_t last = token + kTokenBlock < a.tokens ? token + kTokenBlock : a.tokens;
        const int64_t rows = first + group_rows < a.rows ? first + group_rows : a.rows;
        for (int64_t row = first; row < rows; row += kTile) product_block<T, P>(a, token, last, row);
      }
    });
  });
}

inline void store_int8(int8_t* p, Vec x, int64_t n) {
  float lanes[kLanes];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<int8_t>(lanes[i]);
}

template <class T>
void quantize_token(const Quantize& a, int64_t token) {
  const T* x = static_cast<const T*>(a.x) + token * a.columns;
  int8_t* out = a.integers + token * a.stride;
  Vec most = set1(0.0f);
  for (int64_t j = 0; j < a.columns; j += kLanes) most = max(most, abs(load_some(x + j, a.columns - j)));
  const float found = reduce_max(most), peak = found > a.eps ? found : a.eps;
  const Vec by = set1(127.0f / peak), low = set1(-128.0f), high = set1(127.0f);
  Vec sum = set1(0.0f);
  int32_t total = 0;
  for (int64_t j = 0, since = 0; j < a.columns; j += kLanes) {
    const int64_t left = a.columns - j;
    const Vec q = min(high, max(low, round(load_some(x + j, left) * by)));
#if UZ_ISA_LEVEL >= 2
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(q.v));
    if (left >= kLanes) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j), bytes);
    } else {
      _mm_mask_storeu_epi8(out + j, first(left), bytes);
    }
#else
    store_int8(out + j, q, left < kLanes ? left : kLanes);
#endif
    sum = sum + q;
    if (++since == 4096) {  // fp32 sums of integers are exact up to 2^24
      total += static_cast<int32_t>(reduce_add(sum));
      sum = set1(0.0f);
      since = 0;
    }
  }
  for (int64_t j = a.columns; j < a.stride; ++j) out[j] = 0;
  a.scale[token] = peak / 127.0f;
  a.sum[token] = total + static_cast<int32_t>(reduce_add(sum));
}

void quantize(const Quantize& a, int64_t begin, int64_t end) {
  visit(a.dtype, [&]<class T>(T) {
    for (int64_t token = begin; token < end; ++token) quantize_token<T>(a, token);
  });
}

double absolute_sum(const Ternary& a, int64_t row) {
  double total = 0;
  visit(a.dtype, [&]<class T>(T) {
    const T* w = static_cast<const T*>(a.weight) + row * a.columns;
    Vec sum[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
    int64_t j = 0;
    for (; j + 4 * kLanes <= a.columns; j += 4 * kLanes)
      for (int i = 0; i < 4; ++i) sum[i] = sum[i] + abs(load(w + j + i * kLanes));
    for (; j < a.columns; j += kLanes) sum[0] = sum[0] + abs(load_some(w + j, a.columns - j));
    for (int i = 0; i < 4; ++i) total += reduce_add(sum[i]);
  });
  return total;
}

template <class T, class C>
void ternarize_row(const Ternary& a, int64_t row) {
  const T* w = static_cast<const T*>(a.weight) + row * a.columns;
  const int64_t column_tiles = (a.columns + kTile - 1) / kTile;
  const Vec by = set1(a.inverse), one = set1(1.0f);
  for (int64_t j = 0; j < column_tiles; ++j) {
    float code[kTile];
    for (int64_t i = 0; i < kTile; i += kLanes) {
      const int64_t left = a.columns - j * kTile - i;
      const Vec x = left > 0 ? load_some(w + j * kTile + i, left) : set1(0.0f);
      const Vec c = min(one, max(-one, round(min(set1(4.0f), max(set1(-4.0f), x * by)))));
      store(code + i, c + one);
      if (a.codes != nullptr && left > 0)
        store_some(static_cast<C*>(a.codes) + row * a.columns + j * kTile + i, c, left);
    }
    if (a.packed == nullptr) continue;
    uint8_t* out = a.packed + (row / kTile * column_tiles + j) * 64 + row % kTile * 4;
    for (int b = 0; b < 4; ++b) {
      int byte = 0;
      for (int s = 0; s < 4; ++s) byte |= static_cast<int>(code[4 * s + b]) << (2 * s);
      out[b] = static_cast<uint8_t>(byte);
    }
  }
}

void ternarize(const Ternary& a, int64_t begin, int64_t end) {
  const int64_t column_tiles = (a.columns + kTile - 1) / kTile;
  visit(a.dtype, [&]<class T>(T) {
    visit(a.codes_dtype, [&]<class C>(C) {
      for (int64_t tile = begin; tile < end; ++tile) {
        for (int64_t row = tile * kTile; row < (tile + 1) * kTile; ++row) {
          if (row < a.rows) {
            ternarize_row<T, C>(a, row);
          } else if (a.packed != nullptr) {  // code 0 is stored as 1
            for (int64_t j = 0; j < column_tiles; ++j)
              __builtin_memset(a.packed + (tile * column_tiles + j) * 64 + row % kTile * 4, 0x55, 4);
          }
        }
      }
    });
  });
}

void scale(void* x, DType dtype, float by, int64_t begin, int64_t end) {
  visit(dtype, [&]<class T>(T) {
    T* p = static_cast<T*>(x);
    for (int64_t i = begin; i < end; i += kLanes) store_some(p + i, load_some(p + i, end - i) * set1(by), end - i);
  });
}

void dequantize(const int8_t* integers, const float* scale, int64_t columns, void* x, DType dtype, int64_t begin,
                int64_t end) {
  visit(dtype, [&]<class T>(T) {
    for (int64_t token = begin; token < end; ++token) {
      const int8_t* from = integers + token * columns;
      T* to = static_cast<T*>(x) + token * columns;
      const Vec by = set1(scale[token]);
      for (int64_t j = 0; j < columns; j += kLanes) {
        float lanes[kLanes] = {};
        const int64_t left = columns - j < kLanes ? columns - j : kLanes;
        for (int64_t i = 0; i < left; ++i) lanes[i] = from[j + i];
        store_some(to + j, load(lanes) * by, left);
      }
    }
  });
}

}  // namespace

const BitlinearKernels bitlinear_kernels = {quantize, absolute_sum, ternarize, product, scale, dequantize};

}  // namespace uz::UZ_ISA

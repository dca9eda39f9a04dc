// Packed products. A tile (16 rows, 16 columns) is 64 bytes; shifted by 0, 2, 4, 6 and masked it yields four groups of
// four columns for all 16 rows, each of which is one dot-product instruction per token (VNNI; maddubs + madd without).
// Codes are stored as 0, 1, 2 for -1, 0, 1, so the sum of the token's integers is taken off at the end. Sums are exact:
// maddubs pairs are at most 2 * 2 * 128 = 512, and bind.cpp keeps the columns few enough for int32.
// Floor at one token: the weight's bytes (a quarter byte each); beyond about 8 tokens the dot-product rate: with VNNI
// 12 broadcasts, 4 instructions of unpacking and 24 dot products at a time.
#include "bitlinear/product.h"

namespace uz::UZ_ISA {
namespace {

void product(const PackedProduct& a, int64_t begin, int64_t end) {
  visit(a.dtype, [&]<class T>(T) {
    visit(a.bias_dtype, [&]<class P>(P) {
      for (int64_t item = begin; item < end; ++item) product_item<T, P>(a, item);
    });
  });
}

// The integers of x, which are within [-128, 127].
inline void store_int8(int8_t* p, Vec x, int64_t left) {
#if UZ_ISA_LEVEL >= 2
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v));
  if (left >= kLanes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  _mm_mask_storeu_epi8(p, first(left), bytes);
#elif UZ_ISA_LEVEL == 1
  const __m256i wide = _mm256_cvtps_epi32(x.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(words, words));
  __builtin_memcpy(p, &bytes, static_cast<size_t>(left < kLanes ? left : kLanes));
#else
  float lanes[kLanes];
  store(lanes, x);
  for (int64_t i = 0; i < left && i < kLanes; ++i) p[i] = static_cast<int8_t>(lanes[i]);
#endif
}

template <class T>
void quantize_token(const Quantize& a, int64_t token) {
  const T* x = static_cast<const T*>(a.x) + token * a.columns;
  int8_t* out = a.integers + token * a.stride;
  Vec most = set1(0.0f), finite = set1(0.0f);
  for (int64_t j = 0; j < a.columns; j += kLanes) {
    const Vec value = load_some(x + j, a.columns - j);
    most = max(most, abs(value));
    finite = fma(value, set1(0.0f), finite);  // NaN from then on where a value is infinite or NaN
  }
  const float found = reduce_max(most), peak = found > a.eps ? found : a.eps, check = reduce_add(finite);
  if (check != check) {  // the whole token is NaN, by its scale
    __builtin_memset(out, 0, static_cast<size_t>(a.stride));
    a.scale[token] = check;
    a.sum[token] = 0;
    return;
  }
  // torch takes 127 / peak for the reciprocal times 127.
  const Vec by = set1(1.0f / peak * 127.0f), low = set1(-128.0f), high = set1(127.0f);
  Vec sum = set1(0.0f);
  int32_t total = 0;
  for (int64_t j = 0, since = 0; j < a.columns; j += kLanes) {
    const int64_t left = a.columns - j;
    const Vec q = min(high, max(low, round(load_some(x + j, left) * by)));
    store_int8(out + j, q, left);
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
      const Vec c = round(max(min(x * by, one), -one));  // a NaN counts as 1: the scale is NaN then
      store(code + i, c + one);
      if (a.codes != nullptr && left > 0)
        store_some(static_cast<C*>(a.codes) + row * a.columns + j * kTile + i, c, left);
    }
    if (a.packed == nullptr) continue;
    uint8_t* out = a.packed + (row / kTile * column_tiles + j) * kTileBytes + row % kTile * 4;
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
              __builtin_memset(a.packed + (tile * column_tiles + j) * kTileBytes + row % kTile * 4, 0x55, 4);
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

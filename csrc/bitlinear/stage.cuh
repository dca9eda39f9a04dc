// A stage of a product in shared memory, and the sums that a block of threads takes from it.
#pragma once

#include "bitlinear/kernels.h"
#include "bitlinear/vectors.cuh"

// UZ_SIMT_MMA: the emulator takes this path too, with mma's sums done by shuffles.
#if (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800) || defined(UZ_SIMT_MMA)
#define UZ_BITLINEAR_MMA 1
#endif

namespace uz::cuda {

inline constexpr int kProductThreads = 128;
inline constexpr int kProductWarps = kProductThreads / kWarp;
inline constexpr int kStage = 8;                                            // column tiles of a stage
inline constexpr int kQuarters = static_cast<int>(kTile) / 4;               // 16 bytes each, 4 rows of a tile
inline constexpr int kRowPieces = static_cast<int>(kTileRows) * kQuarters;  // of one column tile
inline constexpr int kCodeStride = kRowPieces + 2;                          // so that tiles begin in different banks

__device__ __forceinline__ float load_as(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::fp32) return static_cast<const float*>(p)[i];
  if (dtype == DType::bf16) return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
  return to_float(static_cast<const __half*>(p)[i]);
}

// Four codes of each row: columns 4 s to 4 s + 3.
__device__ __forceinline__ int codes_of(unsigned word, int s) {
  return static_cast<int>(word >> (2 * s) & 0x03030303u);
}

// y at rows `row` and following of a token, from their sums.
template <class T, int N>
__device__ __forceinline__ void finish(const PackedProduct& a, const float* one_scale, int64_t token, int64_t row,
                                       const int (&sums)[N]) {
  if (token >= a.tokens) return;
  const float token_scale = a.token_scale[token];
  const int less = a.token_sum[token];
  const int64_t left = a.rows - row;
  float y[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= left) continue;
    const float scale = token_scale * (a.row_scale != nullptr ? a.row_scale[row + i] : *one_scale);
    const float bias = a.bias != nullptr ? load_as(a.bias, a.bias_dtype, row + i) : 0.0f;
    y[i] = fmaf(static_cast<float>(sums[i] - less), scale, bias);
  }
  T* const to = static_cast<T*>(a.y) + token * a.rows + row;
  if (N > 1 && a.rows % N == 0 && left >= N)
    store(to, y);
  else
    store(to, y, left);
}

// Where a stage has 16 columns of a token, and the codes of a quarter of a tile. Tokens side by side swap the halves of
// their 128 bytes, so that 8 threads that read 4 column tiles of 2 tokens meet in no bank.
__device__ __forceinline__ int token_at(int token, int tile) { return token * kStage + (tile ^ (token % 2 * 4)); }
__device__ __forceinline__ int codes_at(int row_tile, int tile, int quarter) {
  return tile * kCodeStride + row_tile * kQuarters + quarter;
}

// *to = *from, or zeros where there is nothing; with cp.async it is there after wait_for_copies.
template <class V>
__device__ __forceinline__ void copy(V* to, const V* from, bool here) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), "l"(from), "r"(here ? 16 : 0)
               : "memory");
#else
  *to = {};
  if (here) *to = *from;
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" : : : "memory");
#endif
}

// Brings stages to shared memory: zeros where there are no tokens, rows or columns. Between start and finish they are
// on their way, in registers before sm_80.
template <int kCount>
class Stage {
 public:
  // The block's tokens and rows of tiles begin at `token` and `row_tile`; `pieces` are the column tiles.
  __device__ __forceinline__ Stage(const PackedProduct& a, int64_t token, int64_t row_tile, int pieces)
      : pieces_(pieces), within_(threadIdx.x % kWarp) {
    const int64_t first = token + threadIdx.x / kStage, row = row_tile + threadIdx.x / kWarp;
    tokens_left_ = static_cast<int>(a.tokens - first < kCount ? a.tokens - first : kCount);
    row_here_ = row * kTile < a.rows;
    x_ = reinterpret_cast<const Integers*>(a.integers + first * a.stride) + threadIdx.x % kStage;
    words_ = reinterpret_cast<const Words*>(a.packed + row * pieces * kTileBytes) + within_;
  }

  // The columns from tile `tile` on.
  __device__ __forceinline__ void start(int tile, Integers* tokens, Words* words) {
    const bool here = tile + static_cast<int>(threadIdx.x) % kStage < pieces_;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      bring(tokens_[i], token_to(tokens, i), x_ + i * kApart * pieces_ + tile, here && i * kApart < tokens_left_);
    bring(codes_, codes_to(words), words_ + tile * kQuarters, row_here_ && tile + within_ / kQuarters < pieces_);
  }

  __device__ __forceinline__ void finish(Integers* tokens, Words* words) const {
#if defined(UZ_BITLINEAR_MMA)
    wait_for_copies();
#else
#pragma unroll
    for (int i = 0; i < kEach; ++i) *token_to(tokens, i) = tokens_[i];
    *codes_to(words) = codes_;
#endif
  }

 private:
  static constexpr int kApart = kProductThreads / kStage, kEach = kCount / kApart;  // tokens of a thread

  template <class V>
  static __device__ __forceinline__ void bring(V& held, V* to, const V* from, bool here) {
#if defined(UZ_BITLINEAR_MMA)
    copy(to, from, here);
#else
    held = {};
    if (here) held = *from;
#endif
  }
  static __device__ __forceinline__ Integers* token_to(Integers* tokens, int i) {
    return tokens + token_at(threadIdx.x / kStage + i * kApart, threadIdx.x % kStage);
  }
  __device__ __forceinline__ Words* codes_to(Words* words) const {
    return words + codes_at(threadIdx.x / kWarp, within_ / kQuarters, within_ % kQuarters);
  }

  const Integers* x_;
  const Words* words_;
  int pieces_, within_, tokens_left_;
  bool row_here_;
  Integers tokens_[kEach];
  Words codes_;
};

#if defined(UZ_BITLINEAR_MMA)

// sum (16 rows, 8 tokens) += codes (16, 32) x (32, 8), a warp together. Of lane 4 g + t: codes has rows g, g + 8, g,
// g + 8 at columns 4 t, 4 t, 16 + 4 t, 16 + 4 t; x has token g at the same columns; sum has rows g, g, g + 8, g + 8 and
// tokens 2 t, 2 t + 1, 2 t, 2 t + 1.
__device__ __forceinline__ void mma(int (&sum)[4], const int (&codes)[4], int x0, int x1) {
#if defined(__CUDA_ARCH__)
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(codes[0]), "r"(codes[1]), "r"(codes[2]), "r"(codes[3]), "r"(x0), "r"(x1));
#else
  const int lane = threadIdx.x % kWarp, g = lane / 4 * 4, t = lane % 4 * 8;
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < 4; ++i) {  // codes[i]: row i % 2, half i / 2 of the columns
      const int row = __shfl_sync(kAllLanes, codes[i], g + k);
      for (int token = 0; token < 2; ++token) {
        const int four = __shfl_sync(kAllLanes, i < 2 ? x0 : x1, t + token * 4 + k);
        sum[i % 2 * 2 + token] = __dp4a(row, four, sum[i % 2 * 2 + token]);
      }
    }
  }
#endif
}

// The sums of a warp: 32 rows and half of the tokens.
template <int kCount>
struct Sums {
  static constexpr int kEights = kCount / 16;
  int of[2][kEights][4] = {};
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int row_tile = threadIdx.x / kWarp / 2 * 2, first = threadIdx.x / kWarp % 2 * (kCount / 2);

  __device__ __forceinline__ void add(const Integers* tokens, const Words* words) {
    int codes[4][2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = g + i % 2 * 8;
        const unsigned word = words[codes_at(row_tile + m, t + i / 2 * 4, row / 4)].at[row % 4];
#pragma unroll
        for (int s = 0; s < 4; ++s) codes[s][m][i] = codes_of(word, s);
      }
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
      const Integers x0 = tokens[token_at(first + n * 8 + g, t)], x1 = tokens[token_at(first + n * 8 + g, t + 4)];
#pragma unroll
      for (int s = 0; s < 4; ++s)
#pragma unroll
        for (int m = 0; m < 2; ++m) mma(of[m][n], codes[s][m], x0.at[s], x1.at[s]);
    }
  }

  template <class T>
  __device__ __forceinline__ void write(const PackedProduct& a, const float* one_scale, int64_t token,
                                        int64_t row) const {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < kEights; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int one[1] = {of[m][n][i]};
          finish<T>(a, one_scale, token + first + n * 8 + t * 2 + i % 2, row + (row_tile + m) * kTile + g + i / 2 * 8,
                    one);
        }
  }
};

#else

// The sums of a thread: 4 rows and every eighth token.
template <int kCount>
struct Sums {
  static constexpr int kTokens = kCount * kTile * kTileRows / (4 * kProductThreads), kApart = kCount / kTokens;
  int of[kTokens][4] = {};
  const int rows = threadIdx.x % kRowPieces, first = threadIdx.x / kRowPieces;

  __device__ __forceinline__ void add(const Integers* tokens, const Words* words) {
#pragma unroll 1
    for (int j = 0; j < kStage; ++j) {
      const Words word = words[codes_at(0, j, rows)];
      int codes[4][4];
#pragma unroll
      for (int s = 0; s < 4; ++s)
#pragma unroll
        for (int r = 0; r < 4; ++r) codes[s][r] = codes_of(word.at[r], s);
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        const Integers x = tokens[token_at(first + i * kApart, j)];
#pragma unroll
        for (int s = 0; s < 4; ++s)
#pragma unroll
          for (int r = 0; r < 4; ++r) of[i][r] = __dp4a(codes[s][r], x.at[s], of[i][r]);
      }
    }
  }

  template <class T>
  __device__ __forceinline__ void write(const PackedProduct& a, const float* one_scale, int64_t token,
                                        int64_t row) const {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) finish<T>(a, one_scale, token + first + i * kApart, row + rows * 4, of[i]);
  }
};

#endif

}  // namespace uz::cuda

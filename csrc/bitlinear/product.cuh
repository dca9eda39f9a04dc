// Products of int8 tokens and packed codes, exact in int32. Codes are stored as 0, 1, 2 for -1, 0, 1, so the sum of the
// token's integers is taken off at the end. A 32-bit word holds 16 columns of a row; shifted by 2 s and masked it is
// four codes in four bytes, which one __dp4a multiplies with four integers of a token.
//
// Floor at 2048 columns and 8192 rows: at one token the 4 MiB of codes, 2.7 us at an A100's 1.55 TB/s; at 512 tokens
// 17.2 G operations: 28 us of its int8 tensor cores (624 T/s), 220 us of its __dp4a (78 T/s).
//
// Up to kFewTokens tokens: a block for each row of tiles; its warps split the columns, a warp reads 512 bytes of codes
// at once, a thread keeps the sums of 4 rows with every token. Every code is read once.
// More: a block has 64 rows and 32 or 64 tokens. 128 columns at a time go through shared memory (8 KB of tokens, 2.3 KB
// of codes, twice: while one half is used, the next columns are on their way), where the codes stay packed. A thread
// decodes 4 rows of a tile into 16 registers and uses them for each of its 8 tokens: 128 __dp4a for 28 operations of
// decoding and 9 loads of 16 bytes. From sm_80 on the same stages feed mma.m16n8k32 instead: a thread's words are its
// part of the matrix already, when k runs over (group of columns s, tile). There the stages come by cp.async, which
// needs no registers: at most 128 are used, 4 blocks on an SM.
#pragma once

#include "bitlinear/stage.cuh"

namespace uz::cuda {

inline constexpr int kFewTokens = 8;

// Few tokens. Lanes 4 apart have the same four rows and different column tiles.
template <class T, int kCount>
__global__ void __launch_bounds__(kProductThreads)
    few_tokens_kernel(PackedProduct a, const float* one_scale, int64_t column_tiles) {
  SharedMemory shared;
  int* const sums = shared.take<int>(kProductWarps * kCount * static_cast<int>(kTile));
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, quarter = lane % kQuarters;
  const int64_t row_tile = blockIdx.x;
  const Words* const codes = reinterpret_cast<const Words*>(a.packed) + row_tile * column_tiles * kQuarters + quarter;
  const Integers* const x = reinterpret_cast<const Integers*>(a.integers);
  const int pieces = static_cast<int>(column_tiles), last = static_cast<int>(a.tokens) - 1;
  constexpr int kUnrolled = kCount == 1 ? 4 : kCount < 8 ? 2 : 1;
  int sum[kCount][4] = {};
#pragma unroll kUnrolled
  for (int j = threadIdx.x / kQuarters; j < pieces; j += kProductThreads / kQuarters) {
    const Words words = codes[j * kQuarters];
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      const Integers four = x[(t < last ? t : last) * pieces + j];  // tokens that are not there: the last once more
#pragma unroll
      for (int s = 0; s < 4; ++s)
#pragma unroll
        for (int r = 0; r < 4; ++r) sum[t][r] = __dp4a(codes_of(words.at[r], s), four.at[s], sum[t][r]);
    }
  }
#pragma unroll
  for (int t = 0; t < kCount; ++t) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      for (int lanes = kQuarters; lanes < kWarp; lanes *= 2) sum[t][r] += __shfl_xor_sync(kAllLanes, sum[t][r], lanes);
      if (lane < kQuarters) sums[(warp * kCount + t) * static_cast<int>(kTile) + quarter * 4 + r] = sum[t][r];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kCount * static_cast<int>(kTile); i += kProductThreads) {
    int total[1] = {0};
    for (int w = 0; w < kProductWarps; ++w) total[0] += sums[w * kCount * static_cast<int>(kTile) + i];
    finish<T>(a, one_scale, i / kTile, row_tile * kTile + i % kTile, total);
  }
}

// A block: kCount tokens and kTileRows rows of tiles.
template <class T, int kCount>
__global__ void __launch_bounds__(kProductThreads, 4)
    many_tokens_kernel(PackedProduct a, const float* one_scale, int64_t column_tiles, unsigned groups) {
  SharedMemory shared;
  constexpr int kTokenPieces = kCount * kStage, kCodePieces = kStage * kCodeStride;
  Integers* const tokens = shared.take<Integers>(2 * kTokenPieces);
  Words* const words = shared.take<Words>(2 * kCodePieces);
  const unsigned panel = blockIdx.x / groups, group = blockIdx.x % groups;
  const int pieces = static_cast<int>(column_tiles);
  Sums<kCount> sums;
  Stage<kCount> stage(a, static_cast<int64_t>(panel) * kCount, static_cast<int64_t>(group) * kTileRows, pieces);
  stage.start(0, tokens, words);
  stage.finish(tokens, words);
  __syncthreads();
  for (int tile = 0, now = 0; tile < pieces; tile += kStage, now = 1 - now) {
    Integers* const next_tokens = tokens + (1 - now) * kTokenPieces;
    Words* const next_words = words + (1 - now) * kCodePieces;
    const bool more = tile + kStage < pieces;
    if (more) stage.start(tile + kStage, next_tokens, next_words);
    sums.add(tokens + now * kTokenPieces, words + now * kCodePieces);
    if (more) stage.finish(next_tokens, next_words);
    __syncthreads();
  }
  sums.template write<T>(a, one_scale, static_cast<int64_t>(panel) * kCount,
                         static_cast<int64_t>(group) * kTileRows * kTile);
}

template <class T, int kCount>
Error launch_few(const PackedProduct& a, const float* one_scale, int64_t column_tiles, Stream stream) {
  SharedSize size;
  size.add<int>(kProductWarps * kCount * kTile);
  return launch(few_tokens_kernel<T, kCount>, dim3(static_cast<unsigned>((a.rows + kTile - 1) / kTile)),
                dim3(kProductThreads), size.bytes, stream, a, one_scale, column_tiles);
}

template <class T, int kCount>
Error launch_many(const PackedProduct& a, const float* one_scale, int64_t column_tiles, Stream stream) {
  SharedSize size;
  size.add<Integers>(2 * kCount * kStage);
  size.add<Words>(2 * kStage * kCodeStride);
  const int64_t groups = (a.rows + kTileRows * kTile - 1) / (kTileRows * kTile);
  const int64_t panels = (a.tokens + kCount - 1) / kCount;
  return launch(many_tokens_kernel<T, kCount>, dim3(static_cast<unsigned>(groups * panels)), dim3(kProductThreads),
                size.bytes, stream, a, one_scale, column_tiles, static_cast<unsigned>(groups));
}

inline Error launch_product(const PackedProduct& a, const float* one_scale, Stream stream) {
  if (a.tokens == 0 || a.rows == 0) return nullptr;
  const int64_t tiles = (a.columns + kTile - 1) / kTile;
  return by_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    if (a.tokens == 1) return launch_few<T, 1>(a, one_scale, tiles, stream);
    if (a.tokens == 2) return launch_few<T, 2>(a, one_scale, tiles, stream);
    if (a.tokens <= 4) return launch_few<T, 4>(a, one_scale, tiles, stream);
    if (a.tokens <= kFewTokens) return launch_few<T, 8>(a, one_scale, tiles, stream);
    if (a.tokens <= 32) return launch_many<T, 32>(a, one_scale, tiles, stream);
    return launch_many<T, 64>(a, one_scale, tiles, stream);
  });
}

}  // namespace uz::cuda

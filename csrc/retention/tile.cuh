// Products of tiles: a block of 128 threads adds left^T right to sums in its registers, 16 rows of both at a time
// through shared memory. Every thread holds 8 x 4 sums of each 64 columns, so 3 (of 128 columns: 4) shared loads of 16
// bytes feed 32 (64) multiply-adds. Rows in shared memory are four floats longer than their columns, so that turned
// rows are stored with two-way bank conflicts at most.
#pragma once

#include "common/cuda.cuh"

namespace uz::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = 64;   // rows of a tile, most tokens of a chunk, columns of one part of a tile
constexpr int kDepth = 16;  // rows of a slab
constexpr int kBlocks = 4;  // on an SM, as far as registers go
constexpr int kPad = 4;     // floats between rows in shared memory

// Floats from one row of a slab of 64 kParts columns to the next.
template <int kParts>
constexpr int kLong = kTile * kParts + kPad;

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

// Rows of one head, or a state; offsets within it have 32 bits. vector: four columns at a time are aligned.
template <class T>
struct Matrix {
  const T* data;
  int stride, columns;
  bool vector;

  __device__ __forceinline__ float4 load(int row, int column) const {
    const T* const from = data + (row * stride + column);
    if (vector) {
      const Four<T> x = *reinterpret_cast<const Four<T>*>(from);
      return make_float4(to_float(x.at[0]), to_float(x.at[1]), to_float(x.at[2]), to_float(x.at[3]));
    }
    const int left = columns - column;
    return make_float4(to_float(from[0]), left > 1 ? to_float(from[1]) : 0.0f, left > 2 ? to_float(from[2]) : 0.0f,
                       left > 3 ? to_float(from[3]) : 0.0f);
  }
};

// A thread's place in a tile: rows 4 tile_row() + {0 .. 3, 32 .. 35}, columns 64 j + 4 tile_column() + {0 .. 3}.
__device__ __forceinline__ int tile_row(int thread) { return thread / 64 * 4 + thread % 32 / 8; }
__device__ __forceinline__ int tile_row() { return tile_row(threadIdx.x); }
__device__ __forceinline__ int tile_column(int thread) { return thread / 32 % 2 * 8 + thread % 8; }
__device__ __forceinline__ int tile_column() { return tile_column(threadIdx.x); }

// Part of a matrix on its way to shared memory: 16 rows of 64 kParts columns, or, turned, 16 columns of that many rows,
// which become rows. It goes in kParts pieces, two groups of four columns of a thread at a time.
template <int kParts, bool kTurned>
struct Slab {
  static constexpr int kQuads = 2, kAcross = kTurned ? kDepth / 4 : 16 * kParts, kRows = kThreads / kAcross;
  float4 quads[kQuads];

  // From (row, column) of x on; 0 from row `rows` on. Row r is multiplied by weight(r).
  template <class T, class Weight>
  __device__ __forceinline__ void fetch(const Matrix<T>& x, int row, int column, int rows, const Weight& weight,
                                        int piece = 0) {
    const int first = row + kQuads * kRows * piece + threadIdx.x / kAcross, c = column + threadIdx.x % kAcross * 4;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int r = first + kRows * i;
      quads[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (r < rows && c < x.columns) {
        const float4 loaded = x.load(r, c);
        const float w = weight(r);
        quads[i] = make_float4(w * loaded.x, w * loaded.y, w * loaded.z, w * loaded.w);
      }
    }
  }

  __device__ __forceinline__ void put(float* slab, int piece = 0) const {
    constexpr int kStep = kLong<kParts>;
    const int r = kQuads * kRows * piece + threadIdx.x / kAcross, c = threadIdx.x % kAcross * 4;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if constexpr (kTurned) {
        float* const to = slab + c * kStep + r + kRows * i;
        to[0] = quads[i].x, to[kStep] = quads[i].y, to[2 * kStep] = quads[i].z, to[3 * kStep] = quads[i].w;
      } else {
        *reinterpret_cast<float4*>(slab + (r + kRows * i) * kStep + c) = quads[i];
      }
    }
  }
};

struct One {
  __device__ float operator()(int) const { return 1.0f; }
};

// 64 x 64 kParts sums of a block.
template <int kParts>
struct Sums {
  static constexpr int kUnrolled = kParts == 1 ? 2 : 1;  // rows at once, as registers allow
  float at[8][4 * kParts];

  __device__ __forceinline__ void zero() {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4 * kParts; ++j) at[i][j] = 0.0f;
  }

  __device__ __forceinline__ void scale(float w) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4 * kParts; ++j) at[i][j] *= w;
  }

  // Adds the whole of two slabs.
  __device__ __forceinline__ void add(const float* left, const float* right) {
    left += 4 * tile_row(), right += 4 * tile_column();
#pragma unroll kUnrolled
    for (int d = 0; d < kDepth; ++d) add_row(left + d * kLong<1>, right + d * kLong<kParts>);
  }

  // Adds `depth` rows of left, turned, times the first rows of right.
  __device__ __forceinline__ void add(const float* left, const float* right, int depth) {
    left += 4 * tile_row(), right += 4 * tile_column();
#pragma unroll kUnrolled
    for (int d = 0; d < depth; ++d) add_row(left + d * kLong<1>, right + d * kLong<kParts>);
  }

  // To rows first .. last - 1 of a tile at `to`, of which `columns` columns are left; vector: of 4 aligned columns
  // each.
  template <class T>
  __device__ __forceinline__ void store(T* to, int stride, int first, int last, int columns, bool vector) const {
    // The thread's place, from a shuffle: known beforehand, the rows' addresses would fill registers all along.
    const int thread = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x), threadIdx.x % kWarp);
    const int row = 4 * tile_row(thread), column = 4 * tile_column(thread);
    to += row * stride + column, first -= row, last -= row, columns -= column;
    if (vector) {
#pragma unroll
      for (int j = 0; j < kParts; ++j)
        if (64 * j < columns) store_column<4>(to + 64 * j, 4 * j, stride, first, last);
    } else {
#pragma unroll
      for (int j = 0; j < 4 * kParts; ++j)
        if (j / 4 * 64 + j % 4 < columns) store_column<1>(to + (j / 4 * 64 + j % 4), j, stride, first, last);
    }
  }

 private:
  template <int kWide, class T>
  __device__ __forceinline__ void store_column(T* to, int j, int stride, int first, int last) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = i < 4 ? i : 28 + i;
      if (row >= first && row < last) {
        if constexpr (kWide == 4) {
          *reinterpret_cast<Four<T>*>(to) = {from_float<T>(at[i][j]), from_float<T>(at[i][j + 1]),
                                             from_float<T>(at[i][j + 2]), from_float<T>(at[i][j + 3])};
        } else {
          *to = from_float<T>(at[i][j]);
        }
      }
      to += (i == 3 ? 29 : 1) * stride;
    }
  }

  __device__ __forceinline__ void add_row(const float* left, const float* right) {
    const float4 low = *reinterpret_cast<const float4*>(left), high = *reinterpret_cast<const float4*>(left + 32);
    const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int j = 0; j < kParts; ++j) {
      const float4 y = *reinterpret_cast<const float4*>(right + 64 * j);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        at[i][4 * j] = fmaf(x[i], y.x, at[i][4 * j]);
        at[i][4 * j + 1] = fmaf(x[i], y.y, at[i][4 * j + 1]);
        at[i][4 * j + 2] = fmaf(x[i], y.z, at[i][4 * j + 2]);
        at[i][4 * j + 3] = fmaf(x[i], y.w, at[i][4 * j + 3]);
      }
    }
  }
};

}  // namespace
}  // namespace uz::cuda

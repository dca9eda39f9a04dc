// What the walks of the states do with a chunk: by fp32 arithmetic, 16 tokens at a time, or by tensor cores, 64.
#pragma once

#include "retention/mma.cuh"

namespace uz::cuda {
namespace {

// Plain: tile.cuh.
template <class T, bool kMma>
struct Walk {
  static constexpr int kTokens = kDepth;
  static constexpr size_t kShared = kDepth * kLong<1> * sizeof(float);  // bytes of each side
  using Sums = cuda::Sums<1>;

  struct Side : Slab<1, false> {
    __device__ __forceinline__ explicit Side(float*) {}
  };
};

template <class T>
struct Walk<T, true> {
  static constexpr int kTokens = kTile;
  static constexpr size_t kShared = 2 * kRowsSize * sizeof(Bits);

  // Each warp has 32 x 32 of the 64 x 64 sums: at[4 i + j] is the piece 16 i rows and 8 j columns on.
  struct Sums : cuda::Sums<1> {
    // Adds the first `depth` tokens of left (tokens, rows), each times its weight, and right (tokens, columns).
    template <class Weight>
    __device__ __forceinline__ void add(const Bits* left, const Bits* right, int depth, int rows, int columns,
                                        const Weight& weight) {
      if (first_row() >= rows || first_column() >= columns) return;
      left += first_row(), right += first_column();
#pragma unroll 1
      for (int token = 0; token < depth; token += 8) {
        const int m = token + 2 * Lane().t;
        const float weights[2] = {weight(m), weight(m + 1)};
        unsigned x[4], y[4];
        load_pieces<true>(x, left + token * kRow, 8, 16);
        load_pieces<true>(y, right + token * kRow, 8, 16);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 one = wide<T>(x[2 * i]), other = wide<T>(x[2 * i + 1]);
          const unsigned a[4] = {to_tf32(weights[0] * one.x), to_tf32(weights[0] * other.x),
                                 to_tf32(weights[1] * one.y), to_tf32(weights[1] * other.y)};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float2 b = wide<T>(y[j]);
            mma(this->at[4 * i + j], a, __float_as_uint(b.x), __float_as_uint(b.y));
          }
        }
      }
    }

    // As tf32, for the products that read it. Rows are as long as `stride`, with zeros behind their columns.
    __device__ __forceinline__ void store(float* to, int stride, int rows, int columns) const {
      const Lane lane;
      const int row = first_row() + lane.g, column = first_column() + 2 * lane.t;
      to += row * stride + column;
#pragma unroll
      for (int i = 0; i < 4; ++i, to += 8 * stride) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* const two = this->at[i / 2 * 4 + j] + i % 2 * 2;
          if (row + 8 * i < rows && column + 8 * j < columns)
            *reinterpret_cast<float2*>(to + 8 * j) =
                make_float2(__uint_as_float(to_tf32(two[0])), __uint_as_float(to_tf32(two[1])));
        }
      }
    }

   private:
    static __device__ __forceinline__ int first_row() { return static_cast<int>(threadIdx.x) / 64 * 32; }
    static __device__ __forceinline__ int first_column() { return static_cast<int>(threadIdx.x) / 32 % 2 * 32; }
  };

  // Two halves: while one is used, the next tokens are on their way to the other.
  struct Side {
    Bits* next;
    int other = kRowsSize;

    __device__ __forceinline__ explicit Side(float* memory) : next(reinterpret_cast<Bits*>(memory)) {}
    __device__ __forceinline__ void fetch(const Matrix<T>& x, int row, int column, int last) const {
      copy_rows(next, x, row, column, row, last);
    }
    // What was fetched last, once every thread has waited.
    __device__ __forceinline__ const Bits* take() {
      const Bits* const now = next;
      next += other, other = -other;
      return now;
    }
  };
};

}  // namespace
}  // namespace uz::cuda

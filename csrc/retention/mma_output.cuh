// One chunk of the output by tensor cores. A warp has 16 rows: their scores with all 64 tokens stay in its registers,
// as the left side of the product with v. q, k, v and states pass through shared memory, 64 by 64 at a time.
#pragma once

#include "retention/mma.cuh"
#include "retention/place.cuh"

namespace uz::cuda {
namespace {

// Bytes of shared memory, beside the powers: rows of q; and rows of k or v, or a state.
constexpr size_t kOutputLeft = kRowsSize * sizeof(Bits), kOutputRight = kTile * kTurnedRow * sizeof(float);

// The sums of a warp: piece j has columns 8 j to 8 j + 7.
using RowSums = float[8][4];

// scores (16 rows, m) += q (16 rows, columns) k^T
template <class T>
__device__ __forceinline__ void add_scores(RowSums& sums, const Bits* q, const Bits* k, int m, int columns) {
#pragma unroll 1
  for (int i = 0; i < columns; i += 16) {
    unsigned rows[4];
    load_pieces<false>(rows, q + i, 8 * kRow, 8);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      if (8 * j >= m) continue;
      unsigned two[4];
      load_pieces<false>(two, k + 8 * j * kRow + i, 8, 8 * kRow);
      mma16<T>(sums[j], rows, two[0], two[1]);
      mma16<T>(sums[j + 1], rows, two[2], two[3]);
    }
  }
}

// sums += (q, each row times its weight) state, `depth` columns of q.
template <class T, bool kTurned>
__device__ __forceinline__ void add_state(RowSums& sums, const Bits* q, const float* state, const float (&weights)[2],
                                          int depth, int columns) {
  const Lane lane;
  state += kTurned ? lane.g * kTurnedRow + 2 * lane.t : 2 * lane.t * kFloatRow + lane.g;
#pragma unroll 1
  for (int i = 0; i < depth; i += 16) {
    unsigned words[4];
    load_pieces<false>(words, q + i, 8 * kRow, 8);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 x = wide<T>(words[2 * half]), y = wide<T>(words[2 * half + 1]);
      const unsigned rows[4] = {to_tf32(weights[0] * x.x), to_tf32(weights[1] * y.x), to_tf32(weights[0] * x.y),
                                to_tf32(weights[1] * y.y)};
      const float* const from = state + (i + 8 * half) * (kTurned ? 1 : kFloatRow);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (8 * j >= columns) continue;
        if constexpr (kTurned) {
          const uint2 two = *reinterpret_cast<const uint2*>(from + 8 * j * kTurnedRow);
          mma(sums[j], rows, two.x, two.y);
        } else {
          mma(sums[j], rows, __float_as_uint(from[8 * j]), __float_as_uint(from[8 * j + kFloatRow]));
        }
      }
    }
  }
}

// sums += scores v over the tokens first .. last - 1; v is 0 at the others.
template <class T>
__device__ __forceinline__ void add_values(RowSums& sums, const RowSums& scores, const Bits* v, int first, int last,
                                           int columns) {
  const int t = Lane().t;
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    if (8 * step >= last || 8 * step + 8 <= first) continue;
    const auto of = [&](int i) {  // those of other tokens may be NaN
      const int m = 8 * step + 2 * t + i % 2;
      return m >= first && m < last ? to_tf32(scores[step][i]) : 0u;
    };
    const unsigned rows[4] = {of(0), of(2), of(1), of(3)};
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      if (8 * j >= columns) continue;
      unsigned words[4];
      load_pieces<true>(words, v + 8 * step * kRow + 8 * j, 8, 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 two = wide<T>(words[i]);
        mma(sums[j + i], rows, __float_as_uint(two.x), __float_as_uint(two.y));
      }
    }
  }
}

// 64 x 64 of a state to shared memory; 0 beyond its rows. Rows are aligned, and zeros lie behind their columns. There
// after wait_for_copies.
template <bool kTurned>
__device__ __forceinline__ void copy_state(float* to, const float* state, int stride, int rows, int columns) {
  const int thread = thread_now(), column = thread % 16 * 4;
#pragma unroll 4
  for (int row = thread / 16; row < kTile; row += kThreads / 16) {
    const bool here = row < rows && column < columns;
    const float* const from = here ? state + (row * stride + column) : state;
    copy(reinterpret_cast<uint4*>(to + row * (kTurned ? kTurnedRow : kFloatRow) + column),
         reinterpret_cast<const uint4*>(from), here);
  }
}

// To rows first .. last - 1; pairs: two columns at once, which are aligned.
template <class T>
__device__ __forceinline__ void store_rows(T* to, const RowSums& sums, int stride, int row, int first, int last,
                                           int columns, bool pairs) {
  const auto bits = [](float x) {
    const T rounded = from_float<T>(x);
    return *reinterpret_cast<const Bits*>(&rounded);
  };
#pragma unroll
  for (int i = 0; i < 4; i += 2, row += 8) {
    if (row < first || row >= last) continue;
    auto* const at = reinterpret_cast<Bits*>(to + row * stride);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (8 * j >= columns) continue;
      const Bits one = bits(sums[j][i]), other = bits(sums[j][i + 1]);
      if (pairs) {
        *reinterpret_cast<unsigned*>(at + 8 * j) = one | static_cast<unsigned>(other) << 16;
      } else {
        at[8 * j] = one;
        if (8 * j + 1 < columns) at[8 * j + 1] = other;
      }
    }
  }
}

template <class T, bool kTurned>
__device__ __forceinline__ void output_by_mma(const Output<T>& a) {
  SharedMemory shared;
  float* const power = shared.take<float>(kTile + 1);
  Bits* const left = reinterpret_cast<Bits*>(shared.take<unsigned>(kOutputLeft / sizeof(unsigned)));
  Bits* const right = reinterpret_cast<Bits*>(shared.take<unsigned>(kOutputRight / sizeof(unsigned)));
  const Place<T> here(a);
  const int n = here.n, first_row = static_cast<int>(threadIdx.x) / kWarp * 16;
  set_powers(power, a.layout.log_decay[here.head]);

  const Bits* const left_rows = left + first_row * kRow;
  int held = -1;  // which columns of q are on the left
  const auto copy_q = [&](int i) {
    if (held != i) copy_rows(left, here.keys(a.q), 0, i, 0, n);
    held = i;
  };
  const auto there = [] {
    wait_for_copies();
    __syncthreads();
  };

  RowSums scores = {};
  if (here.any_document()) {
    for (int i = 0; i < a.key; i += kTile) {
      if (i > 0) __syncthreads();  // the columns before have been used
      copy_q(i);
      copy_rows(right, here.keys(a.k), 0, i, 0, n);
      there();
      if (first_row < n) add_scores<T>(scores, left_rows, right, n, a.key - i < kTile ? a.key - i : kTile);
    }
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int distance = first_row + Lane().g + i / 2 * 8 - (8 * j + 2 * Lane().t + i % 2);
      const bool read = distance == 0 || (distance > 0 ? a.before : a.after);
      scores[j][i] = read ? scores[j][i] * power[distance > 0 ? distance : -distance] : 0.0f;
    }

  for (int column = 0; column < a.value; column += kTile) {
    const int columns = a.value - column;
    for (int first = 0; first < n;) {
      const int last = here.borders.after(first, n);
      const bool mine = first_row < last && first_row + 16 > first;
      RowSums sums = {};
      if (!here.row.padding(here.start + first)) {
#pragma unroll 1
        for (int side = 0; side < 2; ++side) {
          if (side == 0 ? first > 0 || !here.enters_before : last < n || !here.enters_after) continue;
          const float* const state = here.state(side);
          float* const to = reinterpret_cast<float*>(right);
#pragma unroll 1
          for (int i = 0; i < a.key; i += kTile) {
            const int rows = kTurned ? column : i, from = kTurned ? i : column;
            copy_q(i);
            copy_state<kTurned>(to, state + (static_cast<int64_t>(rows) * a.stride + from), a.stride,
                                (kTurned ? a.value : a.key) - rows, a.stride - from);
            there();
            if (mine) {
              float weights[2];
#pragma unroll
              for (int k = 0; k < 2; ++k) {
                const int r = first_row + Lane().g + 8 * k;
                weights[k] = r < n ? power[side == 0 ? r + 1 : n - r] : 0.0f;
              }
              add_state<T, kTurned>(sums, left_rows, to, weights, a.key - i < kTile ? a.key - i : kTile, columns);
            }
            __syncthreads();  // the state has been used
          }
        }
        copy_rows(right, here.values(a.v), 0, column, first, last);
        there();
        if (mine) add_values<T>(sums, scores, right, first, last, columns);
        __syncthreads();
      }
      const int thread = thread_now(), r = first_row + thread % kWarp / 4, c = thread % 4 * 2;
      store_rows(here.output(a.o) + column + c, sums, here.value_stride, r, first, last, columns - c,
                 a.value % 2 == 0 && reinterpret_cast<uintptr_t>(a.o) % 4 == 0);
      first = last;
    }
  }
}

}  // namespace
}  // namespace uz::cuda

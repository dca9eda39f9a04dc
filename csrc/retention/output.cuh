// o_n = sum_m decay^|n - m| (q_n . k_m) v_m: the pairs within a chunk, and what the states bring from outside it.
#pragma once

#include "retention/mma_output.cuh"

namespace uz::cuda {
namespace {

// One block computes one chunk of one head: its scores, once, in shared memory; then 64 kParts columns of the output at
// a time. The chunk's documents are taken one after another, every time as if the whole chunk were the document, and
// only the document's own rows are stored: nothing of another document, not even a NaN, reaches them.
template <class T, int kParts, bool kTurned>
__device__ __forceinline__ void plain_output(const Output<T>& a) {
  SharedMemory shared;
  float* const power = shared.take<float>(kTile + 1);
  float* const left = shared.take<float>(kDepth * kLong<1>);
  float* const right = shared.take<float>(kDepth * kLong<kParts>);
  float* const scores = shared.take<float>(kTile * kLong<1>);  // turned: a row for each m

  const Place<T> here(a);
  const int n = here.n;
  set_powers(power, a.layout.log_decay[here.head]);
  __syncthreads();

  const Matrix<T> q = here.keys(a.q), v = here.values(a.v);

  if (here.any_document()) {
    const Matrix<T> k = here.keys(a.k);
    Sums<1> sums;
    sums.zero();
    for (int i = 0; i < a.key; i += kDepth) {
      Slab<1, true> slab_q, slab_k;
      slab_q.fetch(q, 0, i, n, One());
      slab_k.fetch(k, 0, i, n, One());
      __syncthreads();
      slab_q.put(left);
      slab_k.put(right);
      __syncthreads();
      sums.add(left, right);
    }
    const auto decay = [&](int distance) {  // from m to n
      if (distance == 0) return 1.0f;
      return distance > 0 ? (a.before ? power[distance] : 0.0f) : (a.after ? power[-distance] : 0.0f);
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float decays[7];
#pragma unroll
      for (int i = 0; i < 7; ++i) decays[i] = decay(32 * half + 4 * (tile_row() - tile_column()) + i - 3);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = sums.at[4 * half + i][j] * decays[i - j + 3];
        float* const to = scores + (4 * tile_column() + j) * kLong<1> + 4 * tile_row() + 32 * half;
        *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
      }
    }
  }

  const auto to_right = [&](auto& slab, const auto& x, int from_row, int from_column, int rows) {
    slab.fetch(x, from_row, from_column, rows, One());
    __syncthreads();
    slab.put(right);
#pragma unroll 1
    for (int piece = 1; piece < kParts; ++piece) {
      slab.fetch(x, from_row, from_column, rows, One(), piece);
      slab.put(right, piece);
    }
  };
  for (int column = 0; column < a.value; column += 64 * kParts) {
    Sums<kParts> sums;
    for (int first = 0; first < n;) {
      const int last = here.borders.after(first, n);
      sums.zero();
      if (!here.row.padding(here.start + first)) {
#pragma unroll 1
        for (int side = 0; side < 2; ++side) {
          if (side == 0 ? first > 0 || !here.enters_before : last < n || !here.enters_after) continue;
          const Matrix<float> state = {here.state(side), a.stride, kTurned ? a.key : a.value, a.vector_state};
          const auto decay = [&](int i) { return power[side == 0 ? i + 1 : n - i]; };
#pragma unroll 1
          for (int i = 0; i < a.key; i += kDepth) {
            Slab<kParts, kTurned> slab;
            to_right(slab, state, kTurned ? column : i, kTurned ? i : column, kTurned ? a.value : a.key);
            Slab<1, true> slab_q;  // after the other, whose registers are free now
            slab_q.fetch(q, 0, i, n, decay);
            slab_q.put(left);
            __syncthreads();
            sums.add(left, right);
          }
        }
#pragma unroll 1
        for (int m = first; m < last; m += kDepth) {
          Slab<kParts, false> slab;
          to_right(slab, v, m, column, last);
          __syncthreads();
          sums.add(scores + m * kLong<1>, right, last - m < kDepth ? last - m : kDepth);
        }
      }
      sums.store(here.output(a.o) + column, here.value_stride, first, last, a.value - column, a.vector_o);
      first = last;
    }
  }
}

// By tensor cores or plainly, as the architecture has it.
template <class T, int kParts, bool kTurned>
__global__ void __launch_bounds__(kThreads, kBlocks) retention_output(const Output<T> a) {
  if constexpr (kTensorCores<T>) {
    output_by_mma<T, kTurned>(a);
  } else {
    plain_output<T, kParts, kTurned>(a);
  }
}

}  // namespace
}  // namespace uz::cuda

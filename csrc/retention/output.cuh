// o_n = sum_m decay^|n - m| (q_n . k_m) v_m: the pairs within a chunk, and what the states bring from outside it.
#pragma once

#include "retention/documents.cuh"
#include "retention/tile.cuh"

namespace uz::cuda {
namespace {

template <class T>
struct Output {
  Layout layout;
  const T *q, *k, *v;
  T* o;
  int key, value;
  bool vector_key, vector_value, vector_o;
  bool before, after;  // which m are read, beside n itself
  // (batch * heads, count - 1, key, stride), or, kTurned: (.., value, stride). The states from the tokens before a
  // chunk are those of a walk rightwards, the others of one leftwards.
  const float *states_before, *states_after;
  int64_t state_floats;
  int stride;
  bool vector_state;
};

// One block computes one chunk of one head: its scores, once, in shared memory; then 64 kParts columns of the output at
// a time. The chunk's documents are taken one after another, every time as if the whole chunk were the document, and
// only the document's own rows are stored: nothing of another document, not even a NaN, reaches them.
template <class T, int kParts, bool kTurned>
__global__ void __launch_bounds__(kThreads, kBlocks) retention_output(const Output<T> a) {
  SharedMemory shared;
  float* const power = shared.take<float>(kTile + 1);
  float* const left = shared.take<float>(kDepth * kLong<1>);
  float* const right = shared.take<float>(kDepth * kLong<kParts>);
  float* const scores = shared.take<float>(kTile * kLong<1>);  // turned: a row for each m

  const int count = a.layout.count, chunk = static_cast<int>(blockIdx.x % count);
  const int head_and_row = static_cast<int>(blockIdx.x / count), heads = a.layout.heads, head = head_and_row % heads;
  const Row row(a.layout, head_and_row / heads);
  const int64_t start = row.start(chunk), token = head_and_row / heads * a.layout.length + start;
  const int n = row.tokens(chunk);
  const Borders borders = row.borders(chunk);
  const bool enters_before = a.before && row.one_document(start - 1, start + 1);
  const bool enters_after = a.after && row.one_document(start + n - 1, start + n + 1);
  set_powers(power, a.layout.log_decay[head]);
  __syncthreads();

  const int key_stride = heads * a.key, value_stride = heads * a.value;
  const int64_t first_key = token * key_stride + head * a.key, first_value = token * value_stride + head * a.value;
  const Matrix<T> q = {a.q + first_key, key_stride, a.key, a.vector_key};
  const Matrix<T> v = {a.v + first_value, value_stride, a.value, a.vector_value};

  if (borders.after(0, n) < n || !row.padding(start)) {
    const Matrix<T> k = {a.k + first_key, key_stride, a.key, a.vector_key};
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
      const int last = borders.after(first, n);
      sums.zero();
      if (!row.padding(start + first)) {
#pragma unroll 1
        for (int side = 0; side < 2; ++side) {
          if (side == 0 ? first > 0 || !enters_before : last < n || !enters_after) continue;
          const float* const states = side == 0 ? a.states_before : a.states_after;
          const int place = side == 0 ? chunk - 1 : count - 2 - chunk;
          const Matrix<float> state = {
              states + (static_cast<int64_t>(head_and_row) * (count - 1) + place) * a.state_floats, a.stride,
              kTurned ? a.key : a.value, a.vector_state};
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
      sums.store(a.o + first_value + column, value_stride, first, last, a.value - column, a.vector_o);
      first = last;
    }
  }
}

}  // namespace
}  // namespace uz::cuda

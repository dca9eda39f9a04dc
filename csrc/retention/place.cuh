// What the output of a chunk is computed from, and where it lies.
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

// The chunk of a block.
template <class T>
struct Place {
  const Output<T>& a;
  const int count, chunk, head_and_row, heads, head;
  const Row row;
  const int64_t start, token;
  const int n;
  const Borders borders;
  const bool enters_before, enters_after;
  const int key_stride, value_stride;

  __device__ __forceinline__ explicit Place(const Output<T>& a_)
      : a(a_),
        count(a.layout.count),
        chunk(static_cast<int>(blockIdx.x % count)),
        head_and_row(static_cast<int>(blockIdx.x / count)),
        heads(a.layout.heads),
        head(head_and_row % heads),
        row(a.layout, head_and_row / heads),
        start(row.start(chunk)),
        token(head_and_row / heads * a.layout.length + start),
        n(row.tokens(chunk)),
        borders(row.borders(chunk)),
        enters_before(a.before && row.one_document(start - 1, start + 1)),
        enters_after(a.after && row.one_document(start + n - 1, start + n + 1)),
        key_stride(heads * a.key),
        value_stride(heads * a.value) {}

  __device__ __forceinline__ bool any_document() const { return borders.after(0, n) < n || !row.padding(start); }
  __device__ __forceinline__ Matrix<T> keys(const T* x) const {
    return {x + token * key_stride + head * a.key, key_stride, a.key, a.vector_key};
  }
  __device__ __forceinline__ Matrix<T> values(const T* x) const {
    return {x + token * value_stride + head * a.value, value_stride, a.value, a.vector_value};
  }
  __device__ __forceinline__ T* output(T* o) const { return o + token * value_stride + head * a.value; }

  // The state that enters from before (side 0) or from after.
  __device__ __forceinline__ const float* state(int side) const {
    const float* const states = side == 0 ? a.states_before : a.states_after;
    const int place = side == 0 ? chunk - 1 : count - 2 - chunk;
    return states + (static_cast<int64_t>(head_and_row) * (count - 1) + place) * a.state_floats;
  }
};

}  // namespace
}  // namespace uz::cuda

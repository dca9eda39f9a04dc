// Vectors in memory, and reductions over a block, for the kernels of this folder.
#pragma once

#include "common/cuda.cuh"

namespace uz::cuda {

using Integers = Vector<int, 4>;    // 16 int8 of a token: four times four columns
using Words = Vector<unsigned, 4>;  // the codes of four rows of a tile

// Elements of 16 bytes.
template <class T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

template <class T, int N>
__device__ __forceinline__ void load(float (&x)[N], const T* p) {
  const Vector<T, N> v = *reinterpret_cast<const Vector<T, N>*>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = to_float(v.at[i]);
}

// The first `left` elements, 0 for the others.
template <class T, int N>
__device__ __forceinline__ void load(float (&x)[N], const T* p, int64_t left) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = i < left ? to_float(p[i]) : 0.0f;
}

template <class T, int N>
__device__ __forceinline__ void store(T* p, const float (&x)[N]) {
  Vector<T, N> v;
#pragma unroll
  for (int i = 0; i < N; ++i) v.at[i] = from_float<T>(x[i]);
  *reinterpret_cast<Vector<T, N>*>(p) = v;
}

template <class T, int N>
__device__ __forceinline__ void store(T* p, const float (&x)[N], int64_t left) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < left) p[i] = from_float<T>(x[i]);
}

// Rows of `width` elements that all begin at a multiple of 16 bytes.
template <class T>
bool aligned_rows(const T* p, int64_t width) {
  return aligned(p) && width % kWide<T> == 0;
}

// x of all threads put together in a fixed order, in every thread. scratch: one value for each warp.
template <class T, class Op>
__device__ __forceinline__ T block_reduce(T x, T* scratch, const Op& op) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = op(x, __shfl_xor_sync(kAllLanes, x, lanes));
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = scratch[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) x = op(x, scratch[warp]);
  __syncthreads();  // the scratch may be used again
  return x;
}

}  // namespace uz::cuda

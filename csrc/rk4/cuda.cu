// The sums of a Runge-Kutta step, each in one pass. Floor: memory alone. A combination moves 4 slopes, the state and
// the result, 24 bytes an element in fp32 (12 in bf16) for 7 flops; a stage moves 12 (6) for 2. 2048 x 768 in fp32 is
// 38 MB and 19 MB: 24 and 12 us at an A100's 1.55 TB/s. So the loads are 16 bytes wide, all of a thread's are issued
// before the first is used, and a thread keeps no more than one vector of each array (20 registers of them), so that
// registers leave the SM full of threads. Arrays that are not aligned to 16 bytes, and the elements past the last whole
// vector, go one element a thread, still coalesced.
#include "common/cuda.cuh"
#include "rk4/kernels.h"

namespace uz::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 8192;  // beyond that a thread takes several vectors

// Elements of a vector: 16 bytes of the narrower type.
template <class H, class K>
constexpr int kVector = 16 / static_cast<int>(sizeof(H) < sizeof(K) ? sizeof(H) : sizeof(K));

template <class T, int N>
__device__ __forceinline__ Vector<T, N> load(const T* p, int64_t vector) {
  return reinterpret_cast<const Vector<T, N>*>(p)[vector];
}

__device__ __forceinline__ float combined(float h, float k1, float k2, float k3, float k4, float sixth) {
  return fmaf(sixth, fmaf(2.0f, k2 + k3, k1 + k4), h);
}

template <class H, class K>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const H* h, const K* k1, const K* k2, const K* k3, const K* k4, H* out, float sixth, int64_t vectors,
                   int64_t elements) {
  constexpr int N = kVector<H, K>;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = first; i < vectors; i += step) {
    const Vector<H, N> x = load<H, N>(h, i);
    const Vector<K, N> a = load<K, N>(k1, i), b = load<K, N>(k2, i), c = load<K, N>(k3, i), d = load<K, N>(k4, i);
    Vector<H, N> y;
#pragma unroll
    for (int j = 0; j < N; ++j)
      y.at[j] = from_float<H>(combined(to_float(x.at[j]), to_float(a.at[j]), to_float(b.at[j]), to_float(c.at[j]),
                                       to_float(d.at[j]), sixth));
    reinterpret_cast<Vector<H, N>*>(out)[i] = y;
  }
#pragma unroll 1
  for (int64_t i = vectors * N + first; i < elements; i += step)
    out[i] = from_float<H>(
        combined(to_float(h[i]), to_float(k1[i]), to_float(k2[i]), to_float(k3[i]), to_float(k4[i]), sixth));
}

template <class H, class K>
__global__ void __launch_bounds__(kThreads)
    stage_kernel(const H* h, const K* k, H* out, float c, int64_t vectors, int64_t elements) {
  constexpr int N = kVector<H, K>;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = first; i < vectors; i += step) {
    const Vector<H, N> x = load<H, N>(h, i);
    const Vector<K, N> a = load<K, N>(k, i);
    Vector<H, N> y;
#pragma unroll
    for (int j = 0; j < N; ++j) y.at[j] = from_float<H>(fmaf(c, to_float(a.at[j]), to_float(x.at[j])));
    reinterpret_cast<Vector<H, N>*>(out)[i] = y;
  }
#pragma unroll 1
  for (int64_t i = vectors * N + first; i < elements; i += step)
    out[i] = from_float<H>(fmaf(c, to_float(k[i]), to_float(h[i])));
}

dim3 blocks_for(int64_t items) {
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  return dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks));
}

// f(H{}, K{}, whole vectors, grid)
template <class F>
Error by_types(DType state, DType slope, bool wide, int64_t elements, const F& f) {
  return by_dtype(state, [&](auto h) {
    return by_dtype(slope, [&](auto k) {
      constexpr int N = kVector<decltype(h), decltype(k)>;
      const int64_t vectors = wide ? elements / N : 0;
      return f(h, k, vectors, blocks_for(wide ? (elements + N - 1) / N : elements));
    });
  });
}

}  // namespace

Error rk4_combine(const Rk4Combine& a, int64_t elements, Stream stream) {
  const bool wide = aligned(a.h, a.k1, a.k2, a.k3, a.k4, a.out);
  return by_types(a.state, a.slope, wide, elements, [&](auto h, auto k, int64_t vectors, dim3 grid) {
    using H = decltype(h);
    using K = decltype(k);
    return launch(combine_kernel<H, K>, grid, dim3(kThreads), 0, stream, static_cast<const H*>(a.h),
                  static_cast<const K*>(a.k1), static_cast<const K*>(a.k2), static_cast<const K*>(a.k3),
                  static_cast<const K*>(a.k4), static_cast<H*>(a.out), a.sixth, vectors, elements);
  });
}

Error rk4_stage(const Rk4Stage& a, int64_t elements, Stream stream) {
  const bool wide = aligned(a.h, a.k, a.out);
  return by_types(a.state, a.slope, wide, elements, [&](auto h, auto k, int64_t vectors, dim3 grid) {
    using H = decltype(h);
    using K = decltype(k);
    return launch(stage_kernel<H, K>, grid, dim3(kThreads), 0, stream, static_cast<const H*>(a.h),
                  static_cast<const K*>(a.k), static_cast<H*>(a.out), a.c, vectors, elements);
  });
}

}  // namespace uz::cuda

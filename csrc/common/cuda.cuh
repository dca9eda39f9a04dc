// What the cuda.cu files share: element types, launches, shared memory. tests/simt compiles the same sources with a C++
// compiler, against headers of its own that stand in for the toolkit's.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/types.h"

namespace uz::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kPlainShared = 48 * 1024;  // bytes that every device gives a block

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half(x);
}

// Elements that are read and written at once, by 16 bytes where there are as many.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vector {
  T at[N];
};

// Whether all of them begin at a multiple of 16 bytes.
template <class... P>
bool aligned(const P*... p) {
  return ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

// f(T{}) with the element type of a dtype.
template <class F>
Error by_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::bf16:
      return f(__nv_bfloat16{});
    case DType::fp16:
      return f(__half{});
    default:
      return f(float{});
  }
}

// Bytes of dynamic shared memory: add() on the host in the order of the kernel's take().
struct SharedSize {
  size_t bytes = 0;
  template <class T>
  void add(size_t count) {
    bytes += (count * sizeof(T) + 15) / 16 * 16;
  }
};

#if defined(__CUDACC__)
// The block's dynamic shared memory, handed out in pieces aligned to 16 bytes, the same in every thread.
class SharedMemory {
 public:
  __device__ SharedMemory() {
    extern __shared__ __align__(16) unsigned char memory[];
    next_ = memory;
  }

  template <class T>
  __device__ T* take(int count) {
    unsigned char* const piece = next_;
    next_ += (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
    return reinterpret_cast<T*>(piece);
  }

 private:
  unsigned char* next_;
};
#else
using SharedMemory = simt::SharedMemory;
#endif

// Starts a kernel; nullptr, or what CUDA says is wrong. An empty grid starts nothing.
template <class... P, class... A>
Error launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream, A... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  cudaError_t status = cudaSuccess;
  if (shared_bytes > kPlainShared)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (status == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    status = cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
  }
  const cudaError_t last = cudaGetLastError();  // and forgotten, so that the next launch does not report it
  if (status == cudaSuccess) status = last;
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// The sum over the lanes of a full warp, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

}  // namespace uz::cuda

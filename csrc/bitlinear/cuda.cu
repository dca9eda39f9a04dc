// BitNet b1.58. Floors at M tokens, K columns, N rows, fp32 in memory:
//   quantize   reads 4 M K bytes, writes M K: memory. A block takes a token, a thread 16 bytes at a time; the second
//              pass over the token finds it in L1.
//   ternarize  reads 4 N K bytes twice, for mean |W| comes first; the second time they are in L2 if they fit. Writes
//              N K / 4 bytes of codes, or 4 N K for the backward. A thread packs one row of a tile, a word of 4 bytes;
//              half a warp writes a tile.
//   product    N K / 4 bytes of codes, M K of integers, 4 M N of results, 2 M N K operations: product.cuh.
//   dequantize, scale: memory, 16 bytes a thread.
// mean |W| is summed in double over runs of 16 bytes summed in fp32, by a grid that depends on the size of W alone;
// whoever needs it adds up the sums of the blocks in one order. So it is the same in every run, and
// nothing waits for the host.
#include "bitlinear/product.cuh"
#include "bitlinear/vectors.cuh"

namespace uz::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 16;  // beyond that a block takes several pieces of work
constexpr int kInfinity = 0x7f800000;     // the bits of infinity; NaN's are greater, finite numbers' less

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  __device__ int operator()(int a, int b) const { return a > b ? a : b; }
};

template <class T>
__global__ void __launch_bounds__(kThreads) quantize_kernel(Quantize a, int64_t tokens, bool wide) {
  constexpr int N = kWide<T>;
  SharedMemory shared;
  int* const scratch = shared.take<int>(kThreads / kWarp);
  for (int64_t token = blockIdx.x; token < tokens; token += gridDim.x) {
    const T* const x = static_cast<const T*>(a.x) + token * a.columns;
    int8_t* const out = a.integers + token * a.stride;
    int most = 0;  // the bits of the largest |x|
    for (int64_t j = threadIdx.x * N; j < a.columns; j += blockDim.x * N) {
      float value[N];
      wide ? load(value, x + j) : load(value, x + j, a.columns - j);
#pragma unroll
      for (int i = 0; i < N; ++i) most = Max()(most, __float_as_int(fabsf(value[i])));
    }
    most = block_reduce(most, scratch, Max());
    const bool finite = most < kInfinity;  // else the whole token is NaN, by its scale
    const float peak = fmaxf(__int_as_float(finite ? most : 0), a.eps);
    const float by = 1.0f / peak * 127.0f;  // rounded as torch rounds 127 / peak: the integers are the reference's
    int sum = 0;
    for (int64_t j = threadIdx.x * N; j < a.stride; j += blockDim.x * N) {
      float value[N];
      wide&& j < a.columns ? load(value, x + j) : load(value, x + j, a.columns - j);
      Vector<int8_t, N> q;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float scaled = fminf(127.0f, fmaxf(-128.0f, rintf(value[i] * by)));
        q.at[i] = static_cast<int8_t>(finite ? static_cast<int>(scaled) : 0);
        sum += q.at[i];
      }
      *reinterpret_cast<Vector<int8_t, N>*>(out + j) = q;
    }
    sum = block_reduce(sum, scratch, Add());
    if (threadIdx.x == 0) {
      a.scale[token] = finite ? peak / 127.0f : __int_as_float(0x7fc00000);
      a.sum[token] = sum;
    }
  }
}

// The sum of |x| as a tree.
template <int N>
__device__ __forceinline__ float absolute(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = fabsf(x[i]);
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    absolute_sums_kernel(const T* weight, int64_t count, double* sums, bool wide) {
  constexpr int N = kWide<T>;
  SharedMemory shared;
  double* const scratch = shared.take<double>(kThreads / kWarp);
  double sum = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * N;
#pragma unroll 4
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N; i < count; i += step) {
    float x[N];
    wide&& count - i >= N ? load(x, weight + i) : load(x, weight + i, count - i);
    sum += static_cast<double>(absolute(x));
  }
  sum = block_reduce(sum, scratch, Add());
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// max(mean, eps) in every thread, from the sums of so many blocks.
__device__ __forceinline__ float mean_of(const WeightScale& a, int blocks, int64_t count, double* scratch) {
  double sum = 0;
  for (int i = threadIdx.x; i < blocks; i += kThreads) sum += a.sums[i];
  sum = block_reduce(sum, scratch, Add());
  const float mean = static_cast<float>(sum / static_cast<double>(count));
  return mean < a.eps ? a.eps : mean;  // NaN stays
}

__device__ __forceinline__ float code_of(float weight, float inverse) {
  return rintf(fmaxf(fminf(weight * inverse, 1.0f), -1.0f));  // a NaN counts as 1: the scale is NaN then
}

// A thread packs row `row` of a tile; 16 threads beside it the other rows.
template <class T>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(Ternary a, WeightScale scale, int sums, int64_t tiles, int64_t column_tiles, bool wide) {
  constexpr int N = kWide<T>;
  SharedMemory shared;
  const float mean = mean_of(scale, sums, a.rows * a.columns, shared.take<double>(kThreads / kWarp));
  if (blockIdx.x == 0 && threadIdx.x == 0) *scale.value = mean;
  const float inverse = 1.0f / mean;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < tiles * kTile; i += step) {
    const int64_t tile = i / kTile, row = tile / column_tiles * kTile + i % kTile, column = tile % column_tiles * kTile;
    const T* const weight = static_cast<const T*>(a.weight) + row * a.columns + column;
    unsigned word = 0x55555555u;  // code 0 is stored as 1
    if (row < a.rows) {
      word = 0;
#pragma unroll
      for (int part = 0; part < kTile; part += N) {
        const int64_t left = a.columns - column - part;
        float x[N];
        wide&& left > 0 ? load(x, weight + part) : load(x, weight + part, left);
#pragma unroll
        for (int j = 0; j < N; ++j) {  // column 4 s + b: byte b, bits 2 s and 2 s + 1
          const int at = part + j;
          word |= static_cast<unsigned>(1 + static_cast<int>(code_of(x[j], inverse))) << (at % 4 * 8 + at / 4 * 2);
        }
      }
    }
    *reinterpret_cast<unsigned*>(a.packed + i * 4) = word;
  }
}

template <class T, class C>
__global__ void __launch_bounds__(kThreads) codes_kernel(Ternary a, WeightScale scale, int sums, bool wide) {
  constexpr int N = kWide<T>;
  SharedMemory shared;
  const int64_t count = a.rows * a.columns, step = static_cast<int64_t>(gridDim.x) * kThreads * N;
  const float mean = mean_of(scale, sums, count, shared.take<double>(kThreads / kWarp));
  if (blockIdx.x == 0 && threadIdx.x == 0) *scale.value = mean;
  const float inverse = 1.0f / mean;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N; i < count; i += step) {
    const T* const weight = static_cast<const T*>(a.weight) + i;
    C* const codes = static_cast<C*>(a.codes) + i;
    const bool whole = wide && count - i >= N;
    float x[N];
    whole ? load(x, weight) : load(x, weight, count - i);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = code_of(x[j], inverse);
    whole ? store(codes, x) : store(codes, x, count - i);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(Dequantize a, bool wide) {
  constexpr int N = kWide<T>;
  for (int64_t token = blockIdx.x; token < a.tokens; token += gridDim.x) {
    const int8_t* const from = a.integers + token * a.columns;
    T* const to = static_cast<T*>(a.x) + token * a.columns;
    const float by = a.scale[token];
    for (int64_t j = threadIdx.x * N; j < a.columns; j += blockDim.x * N) {
      float x[N];
      if (wide) {
        const Vector<int8_t, N> q = *reinterpret_cast<const Vector<int8_t, N>*>(from + j);
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = static_cast<float>(q.at[i]) * by;
        store(to + j, x);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = j + i < a.columns ? static_cast<float>(from[j + i]) * by : 0.0f;
        store(to + j, x, a.columns - j);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(T* x, const float* by, int64_t count, bool wide) {
  constexpr int N = kWide<T>;
  const float factor = *by;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * N;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N; i < count; i += step) {
    const bool whole = wide && count - i >= N;
    float value[N];
    whole ? load(value, x + i) : load(value, x + i, count - i);
#pragma unroll
    for (int j = 0; j < N; ++j) value[j] *= factor;
    whole ? store(x + i, value) : store(x + i, value, count - i);
  }
}

dim3 blocks_for(int64_t items, int64_t each) {
  const int64_t blocks = (items + each - 1) / each;
  return dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks));
}

// Threads for a row of so many pieces of work: whole warps.
dim3 threads_for(int64_t pieces) {
  const int64_t threads = (pieces + kWarp - 1) / kWarp * kWarp;
  return dim3(static_cast<unsigned>(threads < kThreads ? threads : kThreads));
}

size_t scratch_bytes() {
  SharedSize size;
  size.add<double>(kThreads / kWarp);
  return size.bytes;
}

}  // namespace

Error bitlinear_quantize(const Quantize& a, int64_t tokens, Stream stream) {
  SharedSize size;
  size.add<int>(kThreads / kWarp);
  return by_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    return launch(quantize_kernel<T>, blocks_for(tokens, 1), threads_for(a.stride / kWide<T>), size.bytes, stream, a,
                  tokens, aligned_rows(static_cast<const T*>(a.x), a.columns));
  });
}

Error bitlinear_ternarize(const Ternary& a, const WeightScale& scale, Stream stream) {
  return by_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const T* const weight = static_cast<const T*>(a.weight);
    const int64_t count = a.rows * a.columns, column_tiles = (a.columns + kTile - 1) / kTile;
    const int64_t tiles = (a.rows + kTile - 1) / kTile * column_tiles;
    const bool wide = aligned(weight);
    const dim3 block(kThreads);
    const int64_t blocks = (count + kThreads * kWide<T> - 1) / (kThreads * kWide<T>);
    const int sums = static_cast<int>(blocks < kPartialSums ? blocks : kPartialSums);
    const Error error = launch(absolute_sums_kernel<T>, dim3(static_cast<unsigned>(sums)), block, scratch_bytes(),
                               stream, weight, count, scale.sums, wide);
    if (error != nullptr) return error;
    if (a.packed != nullptr)
      return launch(pack_kernel<T>, blocks_for(tiles * kTile, kThreads), block, scratch_bytes(), stream, a, scale, sums,
                    tiles, column_tiles, aligned_rows(weight, a.columns));
    const dim3 grid = blocks_for(count, kThreads * kWide<T>);
    if (a.codes_dtype == DType::bf16)
      return launch(codes_kernel<T, __nv_bfloat16>, grid, block, scratch_bytes(), stream, a, scale, sums, wide);
    return launch(codes_kernel<T, float>, grid, block, scratch_bytes(), stream, a, scale, sums, wide);
  });
}

Error bitlinear_product(const PackedProduct& a, const float* one_scale, Stream stream) {
  return launch_product(a, one_scale, stream);
}

Error bitlinear_dequantize(const Dequantize& a, Stream stream) {
  return by_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const bool wide = aligned(a.integers) && aligned_rows(static_cast<const T*>(a.x), a.columns);
    return launch(dequantize_kernel<T>, blocks_for(a.tokens, 1), threads_for((a.columns + kWide<T> - 1) / kWide<T>), 0,
                  stream, a, wide);
  });
}

Error bitlinear_scale(void* x, DType dtype, const float* by, int64_t elements, Stream stream) {
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    return launch(scale_kernel<T>, blocks_for(elements, kThreads * kWide<T>), dim3(kThreads), 0, stream,
                  static_cast<T*>(x), by, elements, aligned(x));
  });
}

}  // namespace uz::cuda

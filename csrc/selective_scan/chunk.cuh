// What the forward and the backward on a GPU share. A warp takes one chunk of kChunk positions; its threads cut the
// chunk into slices of kSteps steps, one slice of one channel each: kSteps channels, innermost, times kChunk / kSteps
// slices, for one number of the state at a time.
#pragma once

#include "common/cuda.cuh"
#include "selective_scan/kernels.h"

namespace uz::cuda {
namespace {

constexpr int kChunk = static_cast<int>(kScanChunk);
static_assert(kChunk == kWarp);

constexpr int kMostWarps = 16;
constexpr int kStates = 8;        // the B and C of so many states lie in shared memory at a time
constexpr int kRow = kChunk + 4;  // floats from a state to the next in a tile: 16-byte aligned, each in other banks
constexpr int kTile = kStates * kRow;
constexpr float kLn2 = 0.693147181f;

// x -> factor * x + offset, what a span of steps does to the state that enters it; x -> offset, even of a NaN, if the
// factor is negative: a document starts there.
struct Span {
  float factor, offset;
};

__device__ __forceinline__ float apply(Span f, float x) {
  return f.factor < 0.0f ? f.offset : fmaf(f.factor, x, f.offset);
}

// f after e.
__device__ __forceinline__ Span join(Span f, Span e) {
  return {f.factor < 0.0f || e.factor < 0.0f ? -1.0f : f.factor * e.factor, apply(f, e.offset)};
}

// The steps of a chunk in the order of the scan; bit s of a mask is step s.
struct Chunk {
  int index;                            // by position
  int64_t token;                        // of step 0, row * length + position; it may be past the end of a reversed row
  int sign;                             // from one step to the next
  unsigned inside, real, starts, ends;  // not past the row, not padding, first and last steps of documents
};

__device__ __forceinline__ int chunks_of(const SelectiveScan& a) {
  return static_cast<int>((a.length + kChunk - 1) / kChunk);
}

// Where a chunk stands by position, from where it stands in the order of the scan.
__device__ __forceinline__ int index_of(const SelectiveScan& a, int order) {
  return a.reverse ? chunks_of(a) - 1 - order : order;
}

// Chunk number `order` in the order of the scan, for all lanes of a warp; it may be past the last, and is then empty.
__device__ __forceinline__ Chunk enter(const SelectiveScan& a, int64_t row, int order) {
  const int lane = threadIdx.x % kWarp;
  const int chunks = chunks_of(a);
  Chunk c = {};
  c.index = index_of(a, order);
  c.sign = a.reverse ? -1 : 1;
  const int64_t first = static_cast<int64_t>(c.index) * kChunk + (a.reverse ? kChunk - 1 : 0),
                position = first + c.sign * lane;
  c.token = row * a.length + first;
  const bool inside = order < chunks && position < a.length;
  bool real = inside, starts = false, ends = false;
  if (inside && a.segments != nullptr) {
    const int64_t* segments = a.segments + row * a.length;
    const int64_t id = segments[position];
    // Whether the next token in a direction, padding not counted, is of another document.
    const auto border = [&](int direction) {
      int64_t other = position + direction;
      while (other >= 0 && other < a.length && segments[other] == 0) other += direction;
      return other >= 0 && other < a.length && segments[other] != id;
    };
    real = id != 0;
    starts = real && border(-c.sign);
    ends = real && border(c.sign);
  }
  c.inside = __ballot_sync(kAllLanes, inside);
  c.real = __ballot_sync(kAllLanes, real);
  c.starts = __ballot_sync(kAllLanes, starts);
  c.ends = __ballot_sync(kAllLanes, ends);
  return c;
}

// What the forward keeps of a channel's state: the one that enters chunk `index`.
__device__ __forceinline__ float* kept(const SelectiveScan& a, int64_t row, int index, int n, int channel) {
  return a.states + ((row * chunks_of(a) + index) * a.state + n) * a.dim + channel;
}

// One thread's part of a chunk: kSteps steps of a channel.
template <int kSteps_>
struct Slice {
  static constexpr int kSteps = kSteps_, kChannels = kSteps, kSlices = kChunk / kSteps;
  static constexpr unsigned kMask = (1u << kSteps) - 1;

  static __device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }
  static __device__ __forceinline__ int channel() { return lane() % kChannels; }
  static __device__ __forceinline__ int number() { return lane() / kChannels; }
  static __device__ __forceinline__ int step() { return number() * kSteps; }  // the first one
  static __device__ __forceinline__ unsigned bits(unsigned mask) { return mask >> step() & kMask; }

  // Where the first step is in a (batch, length, dim) array.
  static __device__ __forceinline__ int64_t offset(const SelectiveScan& a, const Chunk& c, int channel) {
    return (c.token + c.sign * step()) * a.dim + channel;
  }
};

// The steps in `real` of an array, 0 elsewhere, where nothing is read.
template <class T, int kSteps>
__device__ __forceinline__ void read(const void* from, int64_t at, int64_t stride, unsigned real, float (&x)[kSteps]) {
#pragma unroll
  for (int s = 0; s < kSteps; ++s)
    x[s] = (real >> s & 1) != 0 ? to_float(static_cast<const T*>(from)[at + s * stride]) : 0.0f;
}

// The steps in `inside`.
template <class T, int kSteps>
__device__ __forceinline__ void write(void* to, int64_t at, int64_t stride, unsigned inside, const float (&x)[kSteps]) {
#pragma unroll
  for (int s = 0; s < kSteps; ++s)
    if ((inside >> s & 1) != 0) static_cast<T*>(to)[at + s * stride] = from_float<T>(x[s]);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// delta to dt, 0 at padding.
template <int kSteps>
__device__ __forceinline__ void step_sizes(const SelectiveScan& a, float bias, unsigned real, float (&delta)[kSteps]) {
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const float x = delta[s] + bias, step = a.softplus ? softplus(x) : x;
    delta[s] = (real >> s & 1) != 0 ? step : 0.0f;
  }
}

template <int kSteps>
__device__ __forceinline__ float sum(const float (&x)[kSteps]) {
  float parts[4] = {};
#pragma unroll
  for (int s = 0; s < kSteps; ++s) parts[s % 4] += x[s];
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// 2^x as the hardware has it, within 2 ulp, but 0 below 2^-126: without the three instructions that exp2f spends there.
__device__ __forceinline__ float power_of_2(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// A log2(e), as if the product were rounded once.
__device__ __forceinline__ float rate(const SelectiveScan& a, int channel, int n, bool active) {
  const float A = active ? a.A[channel * a.state + n] : 0.0f, high = A * 1.44269502f;
  return fabsf(high) < 1e30f ? high + fmaf(A, 1.92596299e-8f, fmaf(A, 1.44269502f, -high)) : high;
}

// B or C of `count` states from n on, as (state, step); 0 at padding. The caller puts __syncwarp() around it.
template <class T>
__device__ __forceinline__ void load_tile(const SelectiveScan& a, const Chunk& c, const void* from, int n, int count,
                                          float* tile) {
  const int lane = threadIdx.x % kWarp, state = lane % kStates, first = lane / kStates;
  const unsigned real = state < count ? c.real >> first : 0;
  const T* p = static_cast<const T*>(from) + (c.token + c.sign * first) * a.state + n + state;
  const int64_t step = c.sign * (kWarp / kStates) * a.state;
  float* to = tile + state * kRow + first;
#pragma unroll
  for (int s = 0; s < kChunk; s += kWarp / kStates, p += step) to[s] = (real >> s & 1) != 0 ? to_float(*p) : 0.0f;
}

// One state's row of a tile, at the thread's steps.
template <int kSteps>
__device__ __forceinline__ void read_row(const float* row, float (&x)[kSteps]) {
#pragma unroll
  for (int s = 0; s < kSteps; s += 4) {
    const float4 four = *reinterpret_cast<const float4*>(row + Slice<kSteps>::step() + s);
    x[s] = four.x, x[s + 1] = four.y, x[s + 2] = four.z, x[s + 3] = four.w;
  }
}

// A span joined with those of all slices before it (kForward) or after it.
template <int kSteps, bool kForward>
__device__ __forceinline__ Span join_slices(Span x) {
  using S = Slice<kSteps>;
#pragma unroll
  for (int slices = 1; slices < S::kSlices; slices *= 2) {
    const int lanes = slices * S::kChannels;
    Span other;
    other.factor = kForward ? __shfl_up_sync(kAllLanes, x.factor, lanes) : __shfl_down_sync(kAllLanes, x.factor, lanes);
    other.offset = kForward ? __shfl_up_sync(kAllLanes, x.offset, lanes) : __shfl_down_sync(kAllLanes, x.offset, lanes);
    if (kForward ? S::number() >= slices : S::number() + slices < S::kSlices) x = join(x, other);
  }
  return x;
}

// The same, but for the slice itself.
template <int kSteps, bool kForward>
__device__ __forceinline__ Span neighbour(Span x) {
  using S = Slice<kSteps>;
  Span other;
  other.factor = kForward ? __shfl_up_sync(kAllLanes, x.factor, S::kChannels)
                          : __shfl_down_sync(kAllLanes, x.factor, S::kChannels);
  other.offset = kForward ? __shfl_up_sync(kAllLanes, x.offset, S::kChannels)
                          : __shfl_down_sync(kAllLanes, x.offset, S::kChannels);
  return (kForward ? S::number() > 0 : S::number() < S::kSlices - 1) ? other : Span{1.0f, 0.0f};
}

}  // namespace
}  // namespace uz::cuda

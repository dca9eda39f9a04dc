// Tiny kernels for the tests of the emulator: a few that are right, and one for each mistake that it has to see.
#include <cstdio>
#include <cstdlib>

#include "common/cuda.cuh"

using uz::cuda::Error;

namespace uz::cuda {
namespace {

constexpr int kThreads = 64;

__device__ int index() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// ---- right ----

// out[i] = the sum of its block's in, through shuffles, shared memory and a barrier
__global__ void block_sum(const float* in, float* out, int n) {
  SharedMemory shared;
  float* const sums = shared.take<float>(kThreads / kWarp);
  const int i = index();
  const float sum = warp_sum(i < n ? in[i] : 0.0f);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (i < n) out[i] = sums[0] + sums[1];
}

// out[i] = how many of its block's in are positive before i, plus 1000 if any is negative
__global__ void positives_before(const float* in, float* out, int n) {
  SharedMemory shared;
  int* const counts = shared.take<int>(kThreads / kWarp);
  const int i = index(), lane = threadIdx.x % kWarp;
  const float x = i < n ? in[i] : 0.0f;
  const unsigned positive = __ballot_sync(kAllLanes, x > 0);
  if (lane == 0) counts[threadIdx.x / kWarp] = __popc(positive);
  const int negative = __syncthreads_or(x < 0);
  const int before = __popc(positive & ((1u << lane) - 1)) + (threadIdx.x >= kWarp ? counts[0] : 0);
  if (i < n) out[i] = static_cast<float>(before + (negative ? 1000 : 0));
}

// out reversed within each warp: lanes write, wait for each other, read
__global__ void reverse_warps(const float* in, float* out, int n) {
  SharedMemory shared;
  float* const lanes = shared.take<float>(kThreads);
  const int i = index();
  lanes[threadIdx.x] = i < n ? in[i] : 0.0f;
  __syncwarp();
  if (i < n) out[i] = lanes[threadIdx.x ^ 31];
}

// out[i] = in at the lanes that the four shuffles name, within groups of 8
__global__ void shuffles(const float* in, float* out, int n) {
  const int i = index();
  const float x = i < n ? in[i] : 0.0f;
  const float sum = __shfl_sync(kAllLanes, x, 3, 8) + 10 * __shfl_up_sync(kAllLanes, x, 2, 8) +
                    100 * __shfl_down_sync(kAllLanes, x, 5, 8) + 1000 * __shfl_xor_sync(kAllLanes, x, 6, 8);
  if (i < n) out[i] = sum;
}

// ---- wrong ----

__global__ void barrier_in_a_branch(const float* in, float* out, int n) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    out[0] = in[0];
    __syncthreads();
  }
}

__global__ void return_before_a_barrier(const float* in, float* out, int n) {
  const int i = index();
  if (i >= n) return;
  __syncthreads();
  out[i] = in[i];
}

__global__ void barrier_against_shuffle(const float* in, float* out, int n) {
  if (threadIdx.x == 0) __syncthreads();
  out[0] = warp_sum(in[0]);
}

__global__ void no_barrier(const float* in, float* out, int n) {
  SharedMemory shared;
  float* const all = shared.take<float>(kThreads);
  const int i = index();
  all[threadIdx.x] = i < n ? in[i] : 0.0f;
  if (i < n) out[i] = all[kThreads - 1 - threadIdx.x];
}

__global__ void same_value_race(const float* in, float* out, int n) {  // the result is right all the same
  SharedMemory shared;
  float* const one = shared.take<float>(1);
  one[0] = in[0];
  __syncthreads();
  if (index() < n) out[index()] = one[0];
}

__global__ void race_between_blocks(const float* in, float* out, int n) {
  if (threadIdx.x < 2) out[blockIdx.x + threadIdx.x] = in[0];
}

__global__ void no_syncwarp(const float* in, float* out, int n) {
  SharedMemory shared;
  float* const lanes = shared.take<float>(kThreads);
  const int i = index();
  lanes[threadIdx.x] = i < n ? in[i] : 0.0f;
  __shfl_sync(kAllLanes, 0, 0);  // a shuffle orders no memory
  if (i < n) out[i] = lanes[threadIdx.x ^ 1];
}

__global__ void read_past_shared(const float* in, float* out, int n) {
  SharedMemory shared;
  float* const one = shared.take<float>(kThreads);
  float* const other = shared.take<float>(kThreads);
  one[threadIdx.x] = other[threadIdx.x] = in[0];
  __syncthreads();
  out[0] = one[kThreads - 63 + threadIdx.x];
}

__global__ void write_past_shared(const float* in, float* out, int n) {
  SharedMemory shared;
  float* const all = shared.take<float>(kThreads - 1);
  all[threadIdx.x] = in[0];
}

__global__ void read_past_input(const float* in, float* out, int n) {
  if (index() == 0) out[0] = in[n];
}

__global__ void write_past_output(const float* in, float* out, int n) {
  if (index() == 0) out[n] = in[0];
}

__global__ void misaligned_vector(const float* in, float* out, int n) {
  if (index() == 0) out[0] = reinterpret_cast<const float4*>(in + 1)->y;
}

__global__ void past_a_local_array(const float* in, float* out, int n) {
  float local[4] = {in[0], in[1], in[2], in[3]};
  const int i = index() == 5 ? n % 4 + 4 : 0;
  out[0] = local[i];
}

__global__ void shared_not_initialised(const float* in, float* out, int n) {
  SharedMemory shared;
  if (index() < n) out[index()] = shared.take<float>(kThreads)[threadIdx.x] + in[0];
}

__global__ void sum_not_initialised(const float* in, float* out, int n) {
  float sum[2];
  for (int i = 0; i < n; ++i) sum[i % 2] += in[i];
  if (index() < n) out[index()] = sum[0] + sum[1];
}

__global__ void not_in_its_mask(const float* in, float* out, int n) { out[0] = __shfl_sync(0xffffu, in[0], 0); }

__global__ void mask_names_the_ended(const float* in, float* out, int n) {
  if (threadIdx.x % kWarp == 7) return;
  out[0] = warp_sum(in[0]);
}

__global__ void mask_names_the_absent(const float* in, float* out, int n) {  // launched with 40 threads
  out[0] = warp_sum(in[0]);
}

__global__ void shuffle_from_outside(const float* in, float* out, int n) {
  if (threadIdx.x < 8) out[0] = __shfl_sync(0xffu, in[0], 9);
}

__global__ void different_masks(const float* in, float* out, int n) {
  const unsigned mask = threadIdx.x % kWarp < 16 ? 0xffffu : kAllLanes;
  out[0] = static_cast<float>(__ballot_sync(mask, 1));
}

__global__ void different_pieces(const float* in, float* out, int n) {
  SharedMemory shared;
  out[0] = shared.take<float>(threadIdx.x == 3 ? 8 : 4) == nullptr ? in[0] : 0.0f;
}

__global__ void shared_of(const float* in, float* out, int n) {
  SharedMemory shared;
  shared.take<float>(n);
}

using Kernel = void (*)(const float*, float*, int);
struct Probe {
  const char* name;
  Kernel kernel;
  int threads = kThreads, shared = 1024, grid_y = 1;
};

#define PROBE(NAME, ...) {#NAME, NAME, ##__VA_ARGS__}
const Probe kProbes[] = {
    PROBE(block_sum),
    PROBE(positives_before),
    PROBE(reverse_warps),
    PROBE(shuffles),
    PROBE(barrier_in_a_branch),
    PROBE(return_before_a_barrier),
    PROBE(barrier_against_shuffle),
    PROBE(no_barrier),
    PROBE(same_value_race),
    PROBE(race_between_blocks),
    PROBE(no_syncwarp),
    PROBE(read_past_shared),
    PROBE(write_past_shared),
    PROBE(read_past_input),
    PROBE(write_past_output),
    PROBE(misaligned_vector),
    PROBE(past_a_local_array),
    PROBE(shared_not_initialised),
    PROBE(sum_not_initialised),
    PROBE(not_in_its_mask),
    PROBE(mask_names_the_ended),
    PROBE(mask_names_the_absent, 40),
    PROBE(shuffle_from_outside),
    PROBE(different_masks),
    PROBE(different_pieces),
    PROBE(shared_of),
    {"large_block", block_sum, 1056},
    {"tall_grid", block_sum, kThreads, 1024, 65536},
    {"shared_beyond_the_device", shared_of, kThreads, 300 << 10},
};

template <class To>
void narrow(const float* in, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const To x = from_float<To>(in[i]);
    __builtin_memcpy(out + i, &x, sizeof(x));
  }
}

template <class From>
void widen(const uint16_t* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    From x;
    __builtin_memcpy(&x, in + i, sizeof(x));
    out[i] = to_float(x);
  }
}

}  // namespace
}  // namespace uz::cuda

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT Error probe(const char* name, const float* in, float* out, int n) {
  using namespace uz::cuda;
  for (const Probe& p : kProbes)
    if (std::strcmp(p.name, name) == 0) {
      const dim3 grid(static_cast<unsigned>((n + kThreads - 1) / kThreads), static_cast<unsigned>(p.grid_y));
      return launch(p.kernel, grid, dim3(static_cast<unsigned>(p.threads)), p.shared, nullptr, in, out, n);
    }
  return "no such probe";
}

EXPORT void to_fp16(const float* in, uint16_t* out, int64_t n) { uz::cuda::narrow<__half>(in, out, n); }
EXPORT void to_bf16(const float* in, uint16_t* out, int64_t n) { uz::cuda::narrow<__nv_bfloat16>(in, out, n); }
EXPORT void from_fp16(const uint16_t* in, float* out, int64_t n) { uz::cuda::widen<__half>(in, out, n); }
EXPORT void from_bf16(const uint16_t* in, float* out, int64_t n) { uz::cuda::widen<__nv_bfloat16>(in, out, n); }

// probe NAME ORDER, for the sanitizers: 100 numbers, in memory of just that size.
extern "C" void simt_configure(int order, unsigned long long seed, int shared_per_block, int capability);

int main(int count, char** arguments) {
  constexpr int n = 100;
  if (count != 3) return 2;
  simt_configure(std::atoi(arguments[2]), 1, 227 << 10, 90);
  float* const in = static_cast<float*>(std::malloc(n * sizeof(float)));
  float* const out = static_cast<float*>(std::malloc(n * sizeof(float)));
  for (int i = 0; i < n; ++i) in[i] = static_cast<float>(i % 7), out[i] = 0;
  const Error error = probe(arguments[1], in, out, n);
  if (error != nullptr) std::puts(error);
  for (int i = 0; i < n; ++i) std::printf("%g ", static_cast<double>(out[i]));
  std::free(in), std::free(out);
  return error == nullptr ? 0 : 3;
}

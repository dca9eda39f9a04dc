// The forward of some channels of a row, as many chunks at a time as the block has warps.
#pragma once

#include "selective_scan/chunk.cuh"

namespace uz::cuda {
namespace {

constexpr int kForwardSteps = 16;

// exp(dt A) and dt u B at each step, and the state after the last one if 0 enters.
template <bool kStarts, int kSteps>
__device__ __forceinline__ float local_state(unsigned starts, float A, const float (&dt)[kSteps],
                                             const float (&dtu)[kSteps], const float* row, float (&decay)[kSteps],
                                             float (&input)[kSteps]) {
  read_row(row, input);
  float h = 0.0f;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    decay[s] = power_of_2(dt[s] * A);
    input[s] *= dtu[s];
    if (kStarts && (starts >> s & 1) != 0) h = 0.0f;
    h = fmaf(decay[s], h, input[s]);
  }
  return h;
}

template <bool kStarts, int kSteps>
__device__ __forceinline__ void replay(unsigned starts, float h, const float* row, const float (&decay)[kSteps],
                                       const float (&input)[kSteps], float (&y)[kSteps]) {
  float h_of[kSteps], C[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (kStarts && (starts >> s & 1) != 0) h = 0.0f;
    h = h_of[s] = fmaf(decay[s], h, input[s]);
  }
  read_row(row, C);
#pragma unroll
  for (int s = 0; s < kSteps; ++s) y[s] = fmaf(C[s], h_of[s], y[s]);
}

template <class T>
__global__ void __launch_bounds__(kMostWarps* kWarp) scan_forward(const SelectiveScan a) {
  constexpr int kSteps = kForwardSteps;
  using S = Slice<kSteps>;
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  const int chunks = chunks_of(a);
  const unsigned groups = static_cast<unsigned>((a.dim + S::kChannels - 1) / S::kChannels);
  const int row = blockIdx.x / groups, channel = (blockIdx.x % groups) * S::kChannels + S::channel();
  const bool active = channel < a.dim;
  SharedMemory shared;
  float* const B = shared.take<float>(warps * kTile) + warp * kTile;
  float* const C = shared.take<float>(warps * kTile) + warp * kTile;
  Span* const spans = shared.take<Span>(2 * warps * S::kChannels) + S::channel();  // (2, warps, channels)
  Chunk* const where = shared.take<Chunk>(warps) + warp;                           // there, for registers are short
  const int64_t stride = a.reverse ? -a.dim : a.dim;

  for (int tile = 0; tile < chunks; tile += warps) {
    __syncthreads();  // the state that enters this tile is kept, and its spans may be written over
    const Chunk chunk = enter(a, row, tile + warp);
    if (S::lane() == 0) *where = chunk;
    const unsigned real = active ? S::bits(chunk.real) : 0, starts = S::bits(chunk.starts);
    float dt[kSteps], dtu[kSteps], y[kSteps];
    read<T>(a.delta, S::offset(a, chunk, channel), stride, real, dt);
    read<T>(a.u, S::offset(a, chunk, channel), stride, real, dtu);
    const float bias = active && a.bias != nullptr ? a.bias[channel] : 0.0f;
    const float D = active && a.D != nullptr ? a.D[channel] : 0.0f;
    step_sizes(a, bias, real, dt);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) y[s] = D * dtu[s], dtu[s] *= dt[s];
    const float time = sum(dt);
#pragma unroll 1
    for (int n0 = 0; n0 < a.state; n0 += kStates) {
      const int count = static_cast<int>(a.state - n0 < kStates ? a.state - n0 : kStates);
      __syncwarp();
      load_tile<T>(a, *where, a.B, n0, count, B);
      load_tile<T>(a, *where, a.C, n0, count, C);
      __syncwarp();
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const int n = n0 + i;
        float h = tile > 0 && active ? *kept(a, row, index_of(a, tile), n, channel) : 0.0f;
        const float A = rate(a, channel, n, active);
        float decay[kSteps], input[kSteps];
        const float local = chunk.starts == 0 ? local_state<false>(0, A, dt, dtu, B + i * kRow, decay, input)
                                              : local_state<true>(starts, A, dt, dtu, B + i * kRow, decay, input);
        const Span whole = join_slices<kSteps, true>({starts == 0 ? power_of_2(time * A) : -1.0f, local});
        const Span before = neighbour<kSteps, true>(whole);
        Span* const now = spans + (i % 2) * warps * S::kChannels;
        if (S::number() == S::kSlices - 1) now[warp * S::kChannels] = whole;
        __syncthreads();
        for (int w = 0; w < warp; ++w) h = apply(now[w * S::kChannels], h);
        if (active && S::number() == 0 && tile + warp < chunks && (tile == 0 || warp > 0))
          *kept(a, row, where->index, n, channel) = h;
        if (active && S::number() == S::kSlices - 1 && warp == warps - 1 && tile + warps < chunks)
          *kept(a, row, index_of(a, tile + warps), n, channel) = apply(whole, h);
        h = apply(before, h);
        if (chunk.starts == 0)
          replay<false>(0, h, C + i * kRow, decay, input, y);
        else
          replay<true>(starts, h, C + i * kRow, decay, input, y);
      }
    }

    __syncwarp();
    const Chunk again = *where;
    const int64_t at = S::offset(a, again, channel);
    const unsigned still_real = active ? S::bits(again.real) : 0;
    if (a.z != nullptr) {
      float z[kSteps];
      read<T>(a.z, at, stride, still_real, z);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) y[s] *= z[s] * sigmoid(z[s]);
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
      if ((still_real >> s & 1) == 0) y[s] = 0.0f;
    write<T>(a.y, at, stride, active ? S::bits(again.inside) : 0, y);
  }
}

}  // namespace
}  // namespace uz::cuda

// The backward of some channels of a row, chunk after chunk against the scan, as many at a time as the block has warps:
// the states come anew from the kept ones, the adjoint g of the state goes back through them.
#pragma once

#include "selective_scan/chunk.cuh"

namespace uz::cuda {
namespace {

constexpr int kBackwardSteps = 8;

// Sums x over the eight channels of a slice; the thread of channel c gets that of step c, in an order that is always
// the same.
__device__ __forceinline__ float sum_channels(float (&x)[8]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float give = upper ? x[i] : x[i + half], keep = upper ? x[i + half] : x[i];
      x[i] = keep + __shfl_xor_sync(kAllLanes, give, half);
    }
  }
  return x[0];
}

// The sum over the slices of a warp, in every lane.
__device__ __forceinline__ float sum_slices(float x) {
#pragma unroll
  for (int lanes = Slice<kBackwardSteps>::kChannels; lanes < kWarp; lanes *= 2)
    x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

// What the thread's steps have of their channel, and what the states add up to.
struct Steps {
  float dt[kBackwardSteps], dtu[kBackwardSteps], dy[kBackwardSteps];   // dt, dt u, the gradient of <C, h>
  float y[kBackwardSteps], ddt[kBackwardSteps], ddtu[kBackwardSteps];  // <C, h>, the gradients of dt and dt u
};

// exp(dt A) at each step, and the state after the last one if 0 enters.
template <bool kBorders>
__device__ __forceinline__ float local_state(unsigned starts, float A, const Steps& x, const float* row,
                                             float (&decay)[kBackwardSteps]) {
  float B[kBackwardSteps], h = 0.0f;
  read_row(row, B);
#pragma unroll
  for (int s = 0; s < kBackwardSteps; ++s) {
    decay[s] = power_of_2(x.dt[s] * A);
    if (kBorders && (starts >> s & 1) != 0) h = 0.0f;
    h = fmaf(decay[s], h, x.dtu[s] * B[s]);
  }
  return h;
}

// The adjoint before the first step if 0 comes from behind the last.
template <bool kBorders>
__device__ __forceinline__ float local_adjoint(unsigned ends, const Steps& x, const float* row,
                                               const float (&decay)[kBackwardSteps]) {
  float C[kBackwardSteps], g = 0.0f;
  read_row(row, C);
#pragma unroll
  for (int s = kBackwardSteps - 1; s >= 0; --s) {
    if (kBorders && (ends >> s & 1) != 0) g = 0.0f;
    g = fmaf(x.dy[s], C[s], g) * decay[s];
  }
  return g;
}

// From the state h that enters: exp(dt A) h at each step, y, and the gradient of C, summed over the channels, of the
// step that the thread's channel is numbered as.
template <bool kBorders>
__device__ __forceinline__ float advance(unsigned starts, float h, Steps& x, const float* B_row, const float* C_row,
                                         const float (&decay)[kBackwardSteps], float (&carried)[kBackwardSteps]) {
  float B[kBackwardSteps], C[kBackwardSteps], dC[kBackwardSteps];
  read_row(B_row, B);
  read_row(C_row, C);
#pragma unroll
  for (int s = 0; s < kBackwardSteps; ++s) {
    if (kBorders && (starts >> s & 1) != 0) h = 0.0f;
    carried[s] = decay[s] * h;
    h = fmaf(x.dtu[s], B[s], carried[s]);
    x.y[s] = fmaf(h, C[s], x.y[s]);
    dC[s] = x.dy[s] * h;
  }
  return sum_channels(dC);
}

// From the adjoint g that comes from behind: the gradients of dt (times log2(e)) and dt u, that of A into dA, and that
// of B, as advance() returns that of C.
template <bool kBorders>
__device__ __forceinline__ float retreat(unsigned ends, float g, float A, Steps& x, const float* B_row,
                                         const float* C_row, const float (&decay)[kBackwardSteps],
                                         const float (&carried)[kBackwardSteps], float& dA) {
  float B[kBackwardSteps], C[kBackwardSteps], dB[kBackwardSteps];
  read_row(B_row, B);
  read_row(C_row, C);
  dA = 0.0f;
#pragma unroll
  for (int s = kBackwardSteps - 1; s >= 0; --s) {
    if (kBorders && (ends >> s & 1) != 0) g = 0.0f;
    g = fmaf(x.dy[s], C[s], g);
    dB[s] = g * x.dtu[s];
    x.ddtu[s] = fmaf(g, B[s], x.ddtu[s]);
    const float through = g * carried[s];  // the gradient of dt A
    x.ddt[s] = fmaf(through, A, x.ddt[s]);
    dA = fmaf(through, x.dt[s], dA);
    g *= decay[s];
  }
  return sum_channels(dB);
}

// dt, dt u and the gradient of <C, h> at the thread's steps; what they add to that of D is returned.
template <class T>
__device__ __forceinline__ float load_steps(const SelectiveScanBackward& b, const Chunk& chunk, int channel,
                                            unsigned real, Steps& x) {
  using S = Slice<kBackwardSteps>;
  const SelectiveScan& a = b.forward;
  const int64_t at = S::offset(a, chunk, channel), stride = a.reverse ? -a.dim : a.dim;
  read<T>(a.delta, at, stride, real, x.dt);
  read<T>(a.u, at, stride, real, x.dtu);
  read<T>(b.grad, at, stride, real, x.dy);
  step_sizes(a, real != 0 && a.bias != nullptr ? a.bias[channel] : 0.0f, real, x.dt);
  if (a.z != nullptr) {
    read<T>(a.z, at, stride, real, x.y);
#pragma unroll
    for (int s = 0; s < S::kSteps; ++s) x.dy[s] *= x.y[s] * sigmoid(x.y[s]);
  }
  float dD[S::kSteps];
#pragma unroll
  for (int s = 0; s < S::kSteps; ++s) {
    dD[s] = x.dy[s] * x.dtu[s];
    x.dtu[s] *= x.dt[s];
    x.y[s] = x.ddt[s] = x.ddtu[s] = 0.0f;
  }
  return sum(dD);
}

// The gradients of u, delta and z, 0 at padding; returns what the steps add to that of the bias.
template <class T>
__device__ __forceinline__ float store_steps(const SelectiveScanBackward& b, const Chunk& chunk, int channel,
                                             unsigned real, unsigned inside, Steps& x) {
  using S = Slice<kBackwardSteps>;
  const SelectiveScan& a = b.forward;
  const int64_t at = S::offset(a, chunk, channel), stride = a.reverse ? -a.dim : a.dim;
  const float D = real != 0 && a.D != nullptr ? a.D[channel] : 0.0f;
  const float bias = real != 0 && a.bias != nullptr ? a.bias[channel] : 0.0f;
  float dbias = 0.0f;
#pragma unroll
  for (int first = 0; first < S::kSteps; first += 4) {
    const int64_t here = at + first * stride;
    const unsigned read_from = real >> first, write_to = inside >> first;
    float u[4], delta[4], z[4], grad[4];
    read<T>(a.u, here, stride, read_from, u);
    read<T>(a.delta, here, stride, a.softplus ? read_from : 0, delta);
    read<T>(a.z, here, stride, a.z != nullptr ? read_from : 0, z);
    read<T>(b.grad, here, stride, a.z != nullptr ? read_from : 0, grad);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int s = first + i;
      const bool is_real = (real >> s & 1) != 0;
      const float gate = sigmoid(z[i]), slope = gate * fmaf(z[i], 1.0f - gate, 1.0f);
      z[i] = is_real ? grad[i] * fmaf(D, u[i], x.y[s]) * slope : 0.0f;
      float ddt = fmaf(x.ddtu[s], u[i], x.ddt[s] * kLn2);
      if (a.softplus) ddt *= sigmoid(delta[i] + bias);
      delta[i] = is_real ? ddt : 0.0f;
      u[i] = is_real ? fmaf(x.ddtu[s], x.dt[s], x.dy[s] * D) : 0.0f;
    }
    write<T>(b.du, here, stride, write_to, u);
    write<T>(b.ddelta, here, stride, write_to, delta);
    write<T>(b.dz, here, stride, a.z != nullptr ? write_to : 0, z);
    dbias += (delta[0] + delta[1]) + (delta[2] + delta[3]);
  }
  return dbias;
}

// A tile of the gradient of B or C into the group's part, or on to what the channels before have put there.
__device__ __forceinline__ void store_tile(const SelectiveScan& a, const Chunk& c, float* part, int n, int count,
                                           bool add, const float* tile) {
  const int lane = threadIdx.x % kWarp, state = lane % kStates, first = lane / kStates;
  const unsigned inside = state < count ? c.inside >> first : 0, real = c.real >> first;
  const int64_t at = (c.token + c.sign * first) * a.state + n + state;
  const int64_t step = static_cast<int64_t>(c.sign) * (kWarp / kStates) * a.state;
  float old[kStates];
#pragma unroll
  for (int i = 0; i < kStates; ++i) old[i] = add && (inside >> (i * 4) & 1) != 0 ? part[at + i * step] : 0.0f;
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    const float x = (real >> (i * 4) & 1) != 0 ? tile[state * kRow + first + i * 4] : 0.0f;
    if ((inside >> (i * 4) & 1) != 0) part[at + i * step] = old[i] + x;
  }
}

// The block has all of the row, for the channels [blockIdx.x % groups * sets * 8, + sets * 8): chunks go backwards, and
// the sets of eight channels take turns at each, so that their gradients of B and C are added up while they are in the
// cache.
template <class T>
__global__ void __launch_bounds__(kMostWarps* kWarp)
    scan_backward(const SelectiveScanBackward b, float* const carry, const int groups, const int sets) {
  constexpr int kSteps = kBackwardSteps;
  using S = Slice<kSteps>;
  static_assert(S::kChannels == 8);
  const SelectiveScan& a = b.forward;
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, chunks = chunks_of(a);
  const int row = blockIdx.x / groups, group = blockIdx.x % groups;
  SharedMemory shared;
  float* const B = shared.take<float>(warps * kTile) + warp * kTile;
  float* const C = shared.take<float>(warps * kTile) + warp * kTile;
  Span* const spans = shared.take<Span>(2 * warps * S::kChannels) + S::channel();  // (2, warps, channels)
  float* const dA_parts = shared.take<float>(kStates * warps * S::kChannels);      // (states, warps, channels)
  float* const other_parts = shared.take<float>(2 * warps * S::kChannels);         // (dD and dbias, warps, channels)
  Chunk* const where = shared.take<Chunk>(warps) + warp;                           // there, for registers are short
  const int last = (chunks - 1) / warps * warps;

  for (int tile = last; tile >= 0; tile -= warps) {
    const Chunk chunk = enter(a, row, tile + warp);
    if (S::lane() == 0) *where = chunk;
    for (int set = 0; set < sets; ++set) {
      const int first_channel = (group * sets + set) * S::kChannels, channel = first_channel + S::channel();
      if (first_channel >= a.dim) break;
      const bool active = channel < a.dim;
      __syncthreads();  // the adjoint that comes from behind is there, and what is shared may be written over
      Steps x;
      const float dD = sum_slices(load_steps<T>(b, chunk, channel, active ? S::bits(chunk.real) : 0, x)),
                  time = sum(x.dt);
      if (S::number() == 0) other_parts[warp * S::kChannels + S::channel()] = dD;

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
          float* const behind = carry + (row * a.state + n) * a.dim + channel;
          float g = tile < last && active ? *behind : 0.0f;
          float h = tile + warp < chunks && active ? *kept(a, row, where->index, n, channel) : 0.0f;
          float* const B_row = B + i * kRow;
          float* const C_row = C + i * kRow;
          const bool whole = (where->starts | where->ends) == 0;
          const unsigned starts = S::bits(where->starts), ends = S::bits(where->ends);
          const float A = rate(a, channel, n, active), factor = power_of_2(time * A);
          float decay[kSteps], carried[kSteps];

          float local =
              whole ? local_state<false>(0, A, x, B_row, decay) : local_state<true>(starts, A, x, B_row, decay);
          const Span until = join_slices<kSteps, true>({starts == 0 ? factor : -1.0f, local});
          h = apply(neighbour<kSteps, true>(until), h);
          const float dC = whole ? advance<false>(0, h, x, B_row, C_row, decay, carried)
                                 : advance<true>(starts, h, x, B_row, C_row, decay, carried);

          local = whole ? local_adjoint<false>(0, x, C_row, decay) : local_adjoint<true>(ends, x, C_row, decay);
          const Span from = join_slices<kSteps, false>({ends == 0 ? factor : -1.0f, local});
          const Span after = neighbour<kSteps, false>(from);
          Span* const now = spans + (i % 2) * warps * S::kChannels;
          if (S::number() == 0) now[warp * S::kChannels] = from;
          __syncthreads();
          for (int w = warps - 1; w > warp; --w) g = apply(now[w * S::kChannels], g);
          if (active && S::number() == 0 && warp == 0) *behind = apply(from, g);
          g = apply(after, g);
          float dA;
          const float dB = whole ? retreat<false>(0, g, A, x, B_row, C_row, decay, carried, dA)
                                 : retreat<true>(ends, g, A, x, B_row, C_row, decay, carried, dA);
          dA = sum_slices(dA);
          if (S::number() == 0) dA_parts[(i * warps + warp) * S::kChannels + S::channel()] = dA;
          __syncwarp();  // B and C of this state have been read
          B_row[S::lane()] = dB;
          C_row[S::lane()] = dC;
        }
        __syncwarp();
        store_tile(a, *where, b.dB + group * a.batch * a.length * a.state, n0, count, set > 0, B);
        store_tile(a, *where, b.dC + group * a.batch * a.length * a.state, n0, count, set > 0, C);
        __syncthreads();
        for (int j = threadIdx.x; j < count * S::kChannels; j += blockDim.x) {
          const int i = j / S::kChannels, c = j % S::kChannels;
          float dA = 0.0f;
          for (int w = 0; w < warps; ++w) dA += dA_parts[(i * warps + w) * S::kChannels + c];
          float* const to = b.dA + (row * a.dim + first_channel + c) * a.state + n0 + i;
          if (first_channel + c < a.dim) *to = tile < last ? *to + dA : dA;
        }
      }

      const Chunk again = *where;
      const float dbias = sum_slices(
          store_steps<T>(b, again, channel, active ? S::bits(again.real) : 0, active ? S::bits(again.inside) : 0, x));
      if (S::number() == 0) other_parts[(warps + warp) * S::kChannels + S::channel()] = dbias;
      __syncthreads();
      if (threadIdx.x < 2 * S::kChannels) {
        const int c = threadIdx.x % S::kChannels, which = threadIdx.x / S::kChannels;
        float total = 0.0f;
        for (int w = 0; w < warps; ++w) total += other_parts[(which * warps + w) * S::kChannels + c];
        float* const to = (which == 0 ? b.dD : b.dbias) + static_cast<int64_t>(row) * a.dim + first_channel + c;
        if (first_channel + c < a.dim) *to = tile < last ? *to + total : total;
      }
    }
  }
}

}  // namespace
}  // namespace uz::cuda

// Chunks of a row of tokens, and the documents in them.
#pragma once

#include "common/cuda.cuh"

namespace uz::cuda {
namespace {

struct Layout {
  const float* log_decay;   // (heads,)
  const int64_t* segments;  // (batch, length) or null
  int64_t length;
  int heads, chunk, count;  // tokens of a chunk (at most 64), chunks of a row
};

// Bit t of 64: token t of a chunk starts a run of equal segments, and t > 0.
struct Borders {
  unsigned low, high;

  // The start of the chunk's last run.
  __device__ int last() const { return high != 0 ? 63 - __clz(high) : low != 0 ? 31 - __clz(low) : 0; }

  // The first border after token t, or `tokens`.
  __device__ int after(int t, int tokens) const {
    const unsigned l = t < 31 ? low >> (t + 1) : 0;
    if (l != 0) return t + __ffs(l);
    const unsigned h = t < 32 ? high : t < 63 ? high >> (t - 31) : 0;
    if (h == 0) return tokens;
    return (t < 32 ? 31 : t) + __ffs(h);
  }
};

// One row of the batch.
class Row {
 public:
  __device__ Row(const Layout& a, int64_t row)
      : segments_(a.segments == nullptr ? nullptr : a.segments + row * a.length), length_(a.length), chunk_(a.chunk) {}

  __device__ int64_t start(int64_t chunk) const { return chunk * chunk_; }
  __device__ int64_t stop(int64_t chunk) const {
    return (chunk + 1) * chunk_ < length_ ? (chunk + 1) * chunk_ : length_;
  }
  __device__ int tokens(int64_t chunk) const { return static_cast<int>(stop(chunk) - start(chunk)); }

  __device__ bool padding(int64_t token) const { return segments_ != nullptr && segments_[token] == 0; }

  // Whether tokens `from` .. `to` - 1, not empty, lie in one document: equal numbers are contiguous.
  __device__ bool one_document(int64_t from, int64_t to) const {
    if (from < 0 || to > length_) return false;
    return segments_ == nullptr || (segments_[from] != 0 && segments_[from] == segments_[to - 1]);
  }

  // Called by full warps.
  __device__ Borders borders(int64_t chunk) const {
    if (segments_ == nullptr) return {0, 0};
    const int lane = threadIdx.x % kWarp, n = tokens(chunk);
    const int64_t* const first = segments_ + start(chunk);
    const unsigned low = __ballot_sync(kAllLanes, lane > 0 && lane < n && first[lane] != first[lane - 1]);
    const unsigned high = __ballot_sync(kAllLanes, lane + 32 < n && first[lane + 32] != first[lane + 31]);
    return {low, high};
  }

 private:
  const int64_t* segments_;
  int64_t length_;
  int chunk_;
};

// power[i] = decay^i for i in 0 .. 64
__device__ __forceinline__ void set_powers(float* power, float log_decay) {
  for (int i = threadIdx.x; i <= 64; i += blockDim.x) power[i] = expf(log_decay * static_cast<float>(i));
}

}  // namespace
}  // namespace uz::cuda

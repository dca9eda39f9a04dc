// Rows with padding inside a document. The kernels of whole chunks take distances for differences of positions, which a
// gap makes too large; what they leave in such a row is written over here, pair by pair: quadratic in the length, and
// meant for the rare row. In all others a block ends at once.
#pragma once

#include "retention/place.cuh"

namespace uz::cuda {
namespace {

constexpr int kGapColumns = 16;  // of the output, a thread's at a time

// One block for each row and head: o_n = sum_m decay^d (q_n . k_m) v_m over the tokens m of the document of n, d the
// real tokens from one to the other.
template <class T>
__global__ void __launch_bounds__(kThreads) retention_gaps(const Output<T> a, const int* const gaps) {
  const int heads = a.layout.heads, head = static_cast<int>(blockIdx.x % heads);
  const int64_t row = blockIdx.x / heads, length = a.layout.length;
  if (gaps[row] == 0) return;
  const int64_t* const ids = a.layout.segments + row * length;
  const float log_decay = a.layout.log_decay[head];
  const auto at = [&](int64_t token, int width) { return ((row * length + token) * heads + head) * width; };
  const int parts = (a.value + kGapColumns - 1) / kGapColumns;
  for (int64_t item = threadIdx.x; item < length * parts; item += blockDim.x) {
    const int64_t n = item / parts;
    const int first = static_cast<int>(item % parts) * kGapColumns;
    const int columns = a.value - first < kGapColumns ? a.value - first : kGapColumns;
    const T* const q = a.q + at(n, a.key);
    float sum[kGapColumns] = {};
    for (int side = 0; side < 2 && ids[n] != 0; ++side) {  // n itself is on the first
      const int step = side == 0 ? -1 : 1;
      int distance = side;
      for (int64_t m = n + side; m >= 0 && m < length && (ids[m] == 0 || ids[m] == ids[n]); m += step) {
        if (ids[m] == 0) continue;
        if (distance > 0 && !(side == 0 ? a.before : a.after)) break;
        const T *const k = a.k + at(m, a.key), *const v = a.v + at(m, a.value) + first;
        float score = 0.0f;
        for (int i = 0; i < a.key; ++i) score = fmaf(to_float(q[i]), to_float(k[i]), score);
        score *= expf(log_decay * static_cast<float>(distance++));
#pragma unroll
        for (int c = 0; c < kGapColumns; ++c)
          if (c < columns) sum[c] = fmaf(score, to_float(v[c]), sum[c]);
      }
    }
#pragma unroll
    for (int c = 0; c < kGapColumns; ++c)
      if (c < columns) a.o[at(n, a.value) + first + c] = from_float<T>(sum[c]);
  }
}

}  // namespace
}  // namespace uz::cuda

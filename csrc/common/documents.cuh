// The documents of a batch on the device, for cuda.cu files: what common/documents.h checks on the host, without making
// the host wait.
#pragma once

#include <cassert>

#include "common/cuda.cuh"

namespace uz::cuda {
namespace {

inline constexpr int kCheckThreads = 256;

// One block for each row. A number that is negative or that returns after another document fails an assertion on the
// device, as an index out of range does in torch. gaps, which may be null, gets whether a row has padding inside a
// document.
__global__ void __launch_bounds__(kCheckThreads)
    check_documents_kernel(const int64_t* const all, const int64_t length, int* const gaps) {
  const int64_t* const ids = all + blockIdx.x * length;
  int gap = 0;
  for (int64_t at = threadIdx.x; at < length; at += blockDim.x) {
    const int64_t id = ids[at];
    if (id == 0) continue;
    int64_t before = at - 1;  // the nearest real token
    while (before >= 0 && ids[before] == 0) --before;
    if (before >= 0 && ids[before] == id) {
      gap |= before < at - 1;
      continue;
    }
    bool returns = false;
    for (int64_t i = 0; i < before; ++i) returns |= ids[i] == id;
    assert(id > 0 && !returns && "segments: number documents from 1 so that each is one run of tokens");
  }
  gap = __syncthreads_or(gap);
  if (gaps != nullptr && threadIdx.x == 0) gaps[blockIdx.x] = gap;
}

// Launched before the kernels that read the segments; `segments` may be null.
inline Error check_documents(const int64_t* segments, int64_t batch, int64_t length, int* gaps, Stream stream) {
  if (segments == nullptr || length == 0) return nullptr;
  return launch(check_documents_kernel, dim3(static_cast<unsigned>(batch)), dim3(kCheckThreads), 0, stream, segments,
                length, gaps);
}

}  // namespace
}  // namespace uz::cuda

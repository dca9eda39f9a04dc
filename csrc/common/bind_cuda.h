// What the bind_cuda.cpp files share: the device and stream that torch works on.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "common/bind.h"

#if !defined(UZ_CUDA_KEY)
#define UZ_CUDA_KEY CUDA  // the dispatch key of the kernels
#endif

namespace uz::cuda {

inline void check(Error error, const char* where) {
  if (error != nullptr) fail(where, ": CUDA: ", error);
}

// launch(stream) on the device and the current stream of `like`.
template <class Launch>
void on_device_of(const Tensor& like, const char* where, const Launch& launch) {
#if defined(UZ_SIMT)  // the emulator has neither
  check(launch(Stream(nullptr)), where);
#else
  const auto device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check(launch(Stream(torch::stable::accelerator::getCurrentStream(device).nativeHandle())), where);
#endif
}

}  // namespace uz::cuda

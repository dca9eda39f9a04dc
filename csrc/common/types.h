// The element types of tensors, without torch.
#pragma once

#include <cstdint>

namespace uz {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

enum class DType : int { fp32, bf16, fp16 };

namespace cuda {

using Stream = void*;       // a cudaStream_t
using Error = const char*;  // what CUDA says is wrong, or nullptr

}  // namespace cuda

}  // namespace uz

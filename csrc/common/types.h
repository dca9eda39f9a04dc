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

}  // namespace uz

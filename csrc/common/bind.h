// What the bind.cpp files share: from torch's stable tensors to raw pointers. Never included by cpu.cpp or cuda.cu.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "common/types.h"

namespace uz {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(ScalarType type, const char* where) {
  switch (type) {
    case ScalarType::Float:
      return DType::fp32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::fp16;
    default:
      STD_TORCH_CHECK(false, where, ": got dtype ", type, ", expected float32, bfloat16 or float16");
  }
}

inline DType dtype_of(const Tensor& x, const char* where) { return dtype_of(x.scalar_type(), where); }

inline void check_same_shape(const Tensor& x, const Tensor& like, const char* where) {
  bool same = x.dim() == like.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == like.size(i);
  STD_TORCH_CHECK(same, where, ": the shapes of the tensors differ");
}

inline Tensor empty_contiguous(const Tensor& like, ScalarType type) {
  return torch::stable::new_empty(like, like.sizes(), type);
}

}  // namespace uz

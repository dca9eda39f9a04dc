// What the bind.cpp files share: from torch's stable tensors to raw pointers.
// Never included by cpu.cpp or cuda.cu.
#pragma once

#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "common/arguments.h"
#include "common/types.h"

namespace uz {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline DType dtype_of(ScalarType type, const char* where) {
  switch (type) {
    case ScalarType::Float:
      return DType::fp32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::fp16;
    default:
      fail(where, ": got dtype ", name_of(type), ", expected float32, bfloat16 or float16");
  }
}

inline DType dtype_of(const Tensor& x, const char* where) { return dtype_of(x.scalar_type(), where); }

// For the sources of plugins that do not use Arguments.
inline void check_same_shape(const Tensor& x, const Tensor& like, const char* where) {
  bool same = x.dim() == like.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == like.size(i);
  if (!same) fail(where, ": got tensors of shapes ", shape_of(x), " and ", shape_of(like), ", expected one shape");
}

inline Optional contiguous(const Optional& x) { return x ? Optional(torch::stable::contiguous(*x)) : std::nullopt; }

// a b for matrices of one dtype, by torch, which is not trusted with the dtype: autocast, if it were on, would change
// it.
inline Tensor matmul(const Tensor& a, const Tensor& b, const char* where) {
  const Tensor product = torch::stable::matmul(a, b);
  if (product.scalar_type() != a.scalar_type() || !product.is_contiguous())
    fail(where, ": torch's matrix product: got ", name_of(product.scalar_type()), ", expected ",
         name_of(a.scalar_type()), " and contiguous memory");
  return product;
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), type);
}

inline Tensor empty_contiguous(const Tensor& like, ScalarType type) {
  return torch::stable::new_empty(like, like.sizes(), type);
}

// body(scratch, begin, end) over parts of [0, items), one part per thread, each
// with its own `floats` of uninitialised memory, aligned to 64 bytes.
template <class Body>
void parallel_with_scratch(const Tensor& like, int64_t items, int64_t floats, const Body& body) {
  const int64_t threads = torch::stable::get_num_threads(), parts = items < threads ? items : threads;
  const int64_t each = (floats + 15) / 16 * 16, sizes[2] = {parts, each};
  const Tensor scratch =
      torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 2), ScalarType::Float);
  float* memory = scratch.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part)
      body(memory + part * each, items * part / parts, items * (part + 1) / parts);
  });
}

}  // namespace uz

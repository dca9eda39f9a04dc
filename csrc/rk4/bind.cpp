#include "common/bind.h"
#include "rk4/kernels.h"

namespace uz {
namespace {

constexpr int64_t kGrain = 16384;  // elements that are worth a thread

template <class Kernel, class Args>
void run(Kernel kernel, const Args& args, int64_t elements) {
  torch::stable::parallel_for(0, elements, kGrain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

Tensor combine(const Tensor& h, const Tensor& k1, const Tensor& k2, const Tensor& k3, const Tensor& k4, double dt) {
  const char* where = "ultrazoo::rk4_combine";
  for (const Tensor* k : {&k1, &k2, &k3, &k4}) {
    check_same_shape(*k, h, where);
    STD_TORCH_CHECK(k->scalar_type() == k1.scalar_type(), where, ": the slopes have different dtypes");
  }
  const Tensor x = torch::stable::contiguous(h), a = torch::stable::contiguous(k1), b = torch::stable::contiguous(k2),
               c = torch::stable::contiguous(k3), d = torch::stable::contiguous(k4);
  Tensor out = empty_contiguous(h, h.scalar_type());
  const Rk4Combine args = {
      .h = x.const_data_ptr(),
      .k1 = a.const_data_ptr(),
      .k2 = b.const_data_ptr(),
      .k3 = c.const_data_ptr(),
      .k4 = d.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .state = dtype_of(h, where),
      .slope = dtype_of(k1, where),
      .sixth = static_cast<float>(dt / 6),
  };
  run(rk4_kernels().combine, args, h.numel());
  return out;
}

Tensor stage(const Tensor& h, const Tensor& k, double c) {
  const char* where = "ultrazoo::rk4_stage";
  check_same_shape(k, h, where);
  const Tensor x = torch::stable::contiguous(h), y = torch::stable::contiguous(k);
  Tensor out = empty_contiguous(h, h.scalar_type());
  const Rk4Stage args = {
      .h = x.const_data_ptr(),
      .k = y.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .state = dtype_of(h, where),
      .slope = dtype_of(k, where),
      .c = static_cast<float>(c),
  };
  run(rk4_kernels().stage, args, h.numel());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ultrazoo, CPU, m) {
  m.impl("rk4_combine", TORCH_BOX(&combine));
  m.impl("rk4_stage", TORCH_BOX(&stage));
}

}  // namespace uz

#include "common/bind_cuda.h"
#include "rk4/inputs.h"

namespace uz::cuda {
namespace {

Tensor combine(const Tensor& h, const Tensor& k1, const Tensor& k2, const Tensor& k3, const Tensor& k4, double dt) {
  const CombineCall call = combine_call(h, k1, k2, k3, k4, dt);
  on_device_of(h, "ultrazoo::rk4_combine", [&](Stream stream) { return rk4_combine(call.args, h.numel(), stream); });
  return call.out;
}

Tensor stage(const Tensor& h, const Tensor& k, double c) {
  const StageCall call = stage_call(h, k, c);
  on_device_of(h, "ultrazoo::rk4_stage", [&](Stream stream) { return rk4_stage(call.args, h.numel(), stream); });
  return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ultrazoo, UZ_CUDA_KEY, m) {
  m.impl("rk4_combine", TORCH_BOX(&combine));
  m.impl("rk4_stage", TORCH_BOX(&stage));
}

}  // namespace uz::cuda

#include "rk4/inputs.h"

namespace uz {
namespace {

constexpr int64_t kGrain = 16384;  // elements that are worth a thread

template <class Kernel, class Args>
void run(Kernel kernel, const Args& args, int64_t elements) {
  torch::stable::parallel_for(0, elements, kGrain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

Tensor combine(const Tensor& h, const Tensor& k1, const Tensor& k2, const Tensor& k3, const Tensor& k4, double dt) {
  const CombineCall call = combine_call(h, k1, k2, k3, k4, dt);
  run(rk4_kernels().combine, call.args, h.numel());
  return call.out;
}

Tensor stage(const Tensor& h, const Tensor& k, double c) {
  const StageCall call = stage_call(h, k, c);
  run(rk4_kernels().stage, call.args, h.numel());
  return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ultrazoo, CPU, m) {
  m.impl("rk4_combine", TORCH_BOX(&combine));
  m.impl("rk4_stage", TORCH_BOX(&stage));
}

}  // namespace uz

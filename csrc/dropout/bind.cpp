#include "common/bind.h"
#include "dropout/kernels.h"

namespace uz {
namespace {

constexpr int64_t kGrain = 128;  // groups that are worth a thread

Tensor dropout(const Tensor& x, const Tensor& seed, int64_t keep) {
  const char* where = "ultrazoo::dropout";
  Arguments checks(where, x);
  checks.tensor("x", x, "...");
  checks.tensor("seed", seed, "", ScalarType::Long);
  checks.range<int64_t>("keep", keep, 1, 65536);
  const Tensor input = torch::stable::contiguous(x);
  Tensor y = empty_contiguous(x, x.scalar_type());
  const Dropout args = {
      .x = input.const_data_ptr(),
      .y = y.mutable_data_ptr(),
      .elements = x.numel(),
      .seed = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()),
      .keep = keep,
      .dtype = dtype_of(x, where),
  };
  torch::stable::parallel_for(0, (args.elements + Dropout::kGroup - 1) / Dropout::kGroup, kGrain,
                              [&](int64_t begin, int64_t end) { dropout_kernels().run(args, begin, end); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ultrazoo, CPU, m) {
  m.impl("dropout", TORCH_BOX(&dropout));
  m.impl("dropout_backward", TORCH_BOX(&dropout));
}

}  // namespace uz

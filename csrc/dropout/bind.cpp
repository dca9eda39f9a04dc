#include "common/bind.h"
#include "dropout/kernels.h"

namespace uz {
namespace {

constexpr int64_t kGrain = 128;  // groups that are worth a thread

Tensor dropout(const Tensor& x, const Tensor& seed, int64_t keep) {
  const char* where = "ultrazoo::dropout";
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, where, ": the seed is not one int64");
  STD_TORCH_CHECK(keep >= 1 && keep <= 65536, where, ": got keep ", keep, ", expected 1 to 65536");
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

#include "common/bind_cuda.h"
#include "retention/inputs.h"

namespace uz::cuda {
namespace {

Tensor work_for(const Retention& args, const Tensor& q) {
  const int64_t floats = retention_work_floats(args, q.size(0));
  return torch::stable::new_empty(q, torch::headeronly::IntHeaderOnlyArrayRef(&floats, 1), ScalarType::Float);
}

Optional gaps_for(const Retention& args, const Tensor& q) {
  return args.segments == nullptr ? Optional() : Optional(empty(q, {q.size(0)}, ScalarType::Int));
}

int* pointer(const Optional& gaps) { return gaps ? gaps->mutable_data_ptr<int>() : nullptr; }

Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay,
               const std::optional<Tensor>& segments, bool causal, std::optional<int64_t> chunk) {
  const char* where = "ultrazoo::retention";
  RetentionInputs in(q, k, v, log_decay, segments, causal, chunk, where);
  Tensor o = empty_contiguous(v, v.scalar_type());
  if (in.items() == 0) return o;
  in.args.o = o.mutable_data_ptr();
  const Tensor work = work_for(in.args, q);
  const Optional gaps = gaps_for(in.args, q);
  on_device_of(q, where, [&](Stream stream) {
    return retention_forward(in.args, q.size(0), work.mutable_data_ptr<float>(), pointer(gaps), stream);
  });
  return o;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& log_decay, const std::optional<Tensor>& segments, bool causal,
                                            std::optional<int64_t> chunk) {
  const char* where = "ultrazoo::retention_backward";
  const RetentionGradientCall call(grad, q, k, v, log_decay, segments, causal, chunk, where);
  if (call.in.items() == 0) return call.results();
  const Tensor work = work_for(call.in.args, q);
  const Optional gaps = gaps_for(call.in.args, q);
  on_device_of(q, where, [&](Stream stream) {
    return retention_backward(call.args, q.size(0), work.mutable_data_ptr<float>(), pointer(gaps), stream);
  });
  return call.results();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ultrazoo, UZ_CUDA_KEY, m) {
  m.impl("retention", TORCH_BOX(&forward));
  m.impl("retention_backward", TORCH_BOX(&backward));
}

}  // namespace uz::cuda

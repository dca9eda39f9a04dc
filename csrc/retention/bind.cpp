#include "common/documents.h"
#include "retention/inputs.h"

namespace uz {
namespace {

Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay,
               const std::optional<Tensor>& segments, bool causal, std::optional<int64_t> chunk) {
  const char* where = "ultrazoo::retention";
  const Documents documents(segments, where);
  RetentionInputs in(documents.close(q), documents.close(k), documents.close(v), log_decay, documents.segments(),
                     causal, chunk, where);
  Tensor o = empty_contiguous(v, v.scalar_type());
  if (in.items() == 0) return o;
  in.args.o = o.mutable_data_ptr();
  const RetentionKernels& kernels = retention_kernels();
  parallel_with_scratch(
      q, in.items(), kernels.scratch_floats(in.args),
      [&](float* scratch, int64_t begin, int64_t end) { kernels.forward(in.args, scratch, begin, end); });
  return documents.open(o);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& log_decay, const std::optional<Tensor>& segments, bool causal,
                                            std::optional<int64_t> chunk) {
  const char* where = "ultrazoo::retention_backward";
  const Documents documents(segments, where);
  const RetentionGradientCall call(documents.close(grad), documents.close(q), documents.close(k), documents.close(v),
                                   log_decay, documents.segments(), causal, chunk, where);
  if (call.in.items() == 0) return call.results();
  const RetentionKernels& kernels = retention_kernels();
  parallel_with_scratch(
      q, call.in.items(), kernels.backward_scratch_floats(call.args),
      [&](float* scratch, int64_t begin, int64_t end) { kernels.backward(call.args, scratch, begin, end); });
  return {documents.open(call.dq), documents.open(call.dk), documents.open(call.dv)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ultrazoo, CPU, m) {
  m.impl("retention", TORCH_BOX(&forward));
  m.impl("retention_backward", TORCH_BOX(&backward));
}

}  // namespace uz

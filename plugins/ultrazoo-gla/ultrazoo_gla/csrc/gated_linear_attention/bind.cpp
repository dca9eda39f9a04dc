#include <tuple>

#include "common/bind.h"
#include "common/documents.h"
#include "gated_linear_attention/kernels.h"

namespace uz {
namespace {

// The inputs, contiguous and alive.
struct Inputs {
  Tensor q, k, v, log_gate;
  Optional segments;
  Arguments checks;
  GatedAttention args;

  Inputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& log_gate_, const Optional& segments_,
         const char* where)
      : q(torch::stable::contiguous(q_)),
        k(torch::stable::contiguous(k_)),
        v(torch::stable::contiguous(v_)),
        log_gate(torch::stable::contiguous(log_gate_)),
        segments(contiguous(segments_)),
        checks(where, q_) {
    checks.tensor("q", q, "B, L, H, K");
    checks.tensor("k", k, "B, L, H, K", q.scalar_type());
    checks.tensor("v", v, "B, L, H, V", q.scalar_type());
    checks.tensor("log_gate", log_gate, "B, L, D, H, K", ScalarType::Float);
    checks.range<int64_t>("log_gate: D", checks.size("D"), 1, 2);
    checks.tensor("segments", segments, "B, L", ScalarType::Long);
    args = {
        .q = q.const_data_ptr(),
        .k = k.const_data_ptr(),
        .v = v.const_data_ptr(),
        .o = nullptr,
        .log_gate = log_gate.const_data_ptr<float>(),
        .segments = segments ? segments->const_data_ptr<int64_t>() : nullptr,
        .length = q.size(1),
        .directions = log_gate.size(2),
        .heads = q.size(2),
        .key = q.size(3),
        .value = v.size(3),
        .dtype = dtype_of(q, where),
    };
  }

  int64_t items() const { return args.length > 0 ? q.size(0) * args.heads : 0; }
};

Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_gate, const Optional& segments) {
  const char* where = "gla::gated_linear_attention";
  const Documents documents(segments, where);
  Inputs in(documents.close(q), documents.close(k), documents.close(v), documents.close(log_gate), documents.segments(),
            where);
  Tensor o = empty_contiguous(v, v.scalar_type());
  if (in.items() == 0) return o;
  in.args.o = o.mutable_data_ptr();
  const GatedAttentionKernels& kernels = gated_attention_kernels();
  parallel_with_scratch(
      q, in.items(), kernels.scratch_floats(in.args),
      [&](float* scratch, int64_t begin, int64_t end) { kernels.forward(in.args, scratch, begin, end); });
  return documents.open(o);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_, const Tensor& q, const Tensor& k,
                                                    const Tensor& v, const Tensor& log_gate, const Optional& segments) {
  const char* where = "gla::gated_linear_attention_backward";
  const Documents documents(segments, where);
  Inputs in(documents.close(q), documents.close(k), documents.close(v), documents.close(log_gate), documents.segments(),
            where);
  in.checks.tensor("grad", grad_, "B, L, H, V", v.scalar_type());
  const Tensor grad = torch::stable::contiguous(documents.close(grad_));
  Tensor dq = empty_contiguous(q, q.scalar_type()), dk = empty_contiguous(k, k.scalar_type());
  Tensor dv = empty_contiguous(v, v.scalar_type()), dlog_gate = empty_contiguous(log_gate, log_gate.scalar_type());
  if (in.items() > 0) {
    const GatedAttentionBackward args = {
        .forward = in.args,
        .grad = grad.const_data_ptr(),
        .dq = dq.mutable_data_ptr(),
        .dk = dk.mutable_data_ptr(),
        .dv = dv.mutable_data_ptr(),
        .dlog_gate = dlog_gate.mutable_data_ptr<float>(),
    };
    const GatedAttentionKernels& kernels = gated_attention_kernels();
    parallel_with_scratch(
        q, in.items(), kernels.backward_scratch_floats(args),
        [&](float* scratch, int64_t begin, int64_t end) { kernels.backward(args, scratch, begin, end); });
  }
  return {documents.open(dq), documents.open(dk), documents.open(dv), documents.open(dlog_gate)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gla, CPU, m) {
  m.impl("gated_linear_attention", TORCH_BOX(&forward));
  m.impl("gated_linear_attention_backward", TORCH_BOX(&backward));
}

}  // namespace uz

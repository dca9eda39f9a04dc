#include <optional>
#include <tuple>

#include "common/bind.h"
#include "retention/kernels.h"

namespace uz {
namespace {

constexpr int64_t kChunk = 64;  // scores, operands and state of one head in L1 and L2

// The inputs, contiguous and alive, and the kernel's view of them.
struct Inputs {
  Tensor q, k, v, log_decay;
  std::optional<Tensor> segments;
  Retention args;

  Inputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& log_decay_,
         const std::optional<Tensor>& segments_, bool causal, std::optional<int64_t> chunk, const char* where)
      : q(torch::stable::contiguous(q_)),
        k(torch::stable::contiguous(k_)),
        v(torch::stable::contiguous(v_)),
        log_decay(torch::stable::contiguous(log_decay_)),
        segments(segments_ ? std::optional<Tensor>(torch::stable::contiguous(*segments_)) : std::nullopt) {
    check_same_shape(k, q, where);
    STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), where,
                    ": q, k and v have different dtypes");
    const int64_t length = q.size(1), size = chunk.value_or(kChunk);
    args = {
        .q = q.const_data_ptr(),
        .k = k.const_data_ptr(),
        .v = v.const_data_ptr(),
        .o = nullptr,
        .log_decay = log_decay.const_data_ptr<float>(),
        .segments = segments ? segments->const_data_ptr<int64_t>() : nullptr,
        .length = length,
        .heads = q.size(2),
        .key = q.size(3),
        .value = v.size(3),
        .chunk = size < length ? size : length,
        .dtype = dtype_of(q, where),
        .causal = causal,
    };
  }

  int64_t items() const { return args.length > 0 ? q.size(0) * args.heads : 0; }
};

Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay,
               const std::optional<Tensor>& segments, bool causal, std::optional<int64_t> chunk) {
  Inputs in(q, k, v, log_decay, segments, causal, chunk, "ultrazoo::retention");
  Tensor o = empty_contiguous(v, v.scalar_type());
  if (in.items() == 0) return o;
  in.args.o = o.mutable_data_ptr();
  const RetentionKernels& kernels = retention_kernels();
  parallel_with_scratch(
      q, in.items(), kernels.scratch_floats(in.args),
      [&](float* scratch, int64_t begin, int64_t end) { kernels.forward(in.args, scratch, begin, end); });
  return o;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& log_decay, const std::optional<Tensor>& segments, bool causal,
                                            std::optional<int64_t> chunk) {
  const char* where = "ultrazoo::retention_backward";
  const Inputs in(q, k, v, log_decay, segments, causal, chunk, where);
  check_same_shape(grad, v, where);
  STD_TORCH_CHECK(grad.scalar_type() == v.scalar_type(), where, ": grad and v have different dtypes");
  const Tensor g = torch::stable::contiguous(grad);
  Tensor dq = empty_contiguous(q, q.scalar_type()), dk = empty_contiguous(k, k.scalar_type()),
         dv = empty_contiguous(v, v.scalar_type());
  if (in.items() == 0) return {dq, dk, dv};
  const RetentionBackward args = {
      .forward = in.args,
      .grad = g.const_data_ptr(),
      .dq = dq.mutable_data_ptr(),
      .dk = dk.mutable_data_ptr(),
      .dv = dv.mutable_data_ptr(),
  };
  const RetentionKernels& kernels = retention_kernels();
  parallel_with_scratch(
      q, in.items(), kernels.backward_scratch_floats(args),
      [&](float* scratch, int64_t begin, int64_t end) { kernels.backward(args, scratch, begin, end); });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ultrazoo, CPU, m) {
  m.impl("retention", TORCH_BOX(&forward));
  m.impl("retention_backward", TORCH_BOX(&backward));
}

}  // namespace uz

// What every device's binding of retention does first: checks, contiguous inputs, the kernel's view of them.
#pragma once

#include <optional>
#include <tuple>

#include "common/bind.h"
#include "retention/kernels.h"

namespace uz {

// The inputs of the forward, contiguous and alive; args.o is yet to be set.
struct RetentionInputs {
  static constexpr int64_t kChunk = 64;  // on a CPU: scores, operands and state of one head in L1 and L2

  Tensor q, k, v, log_decay;
  std::optional<Tensor> segments;
  Arguments checks;
  Retention args;

  RetentionInputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& log_decay_,
                  const std::optional<Tensor>& segments_, bool causal, std::optional<int64_t> chunk, const char* where)
      : q(torch::stable::contiguous(q_)),
        k(torch::stable::contiguous(k_)),
        v(torch::stable::contiguous(v_)),
        log_decay(torch::stable::contiguous(log_decay_)),
        segments(contiguous(segments_)),
        checks(where, q_) {
    checks.tensor("q", q, "B, L, H, K");
    checks.tensor("k", k, "B, L, H, K", q.scalar_type());
    checks.tensor("v", v, "B, L, H, V", q.scalar_type());
    checks.tensor("log_decay", log_decay, "H", ScalarType::Float);
    checks.tensor("segments", segments, "B, L", ScalarType::Long);
    if (chunk) checks.at_least(1, "chunk_size", *chunk);
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

// Those of the backward, and its results.
struct RetentionGradientCall {
  RetentionInputs in;
  Tensor grad, dq, dk, dv;  // contiguous
  RetentionBackward args;

  RetentionGradientCall(const Tensor& grad_, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay,
                        const std::optional<Tensor>& segments, bool causal, std::optional<int64_t> chunk,
                        const char* where)
      : in(q, k, v, log_decay, segments, causal, chunk, where),
        grad(torch::stable::contiguous(grad_)),
        dq(empty_contiguous(q, q.scalar_type())),
        dk(empty_contiguous(k, k.scalar_type())),
        dv(empty_contiguous(v, v.scalar_type())) {
    in.checks.tensor("grad", grad, "B, L, H, V", v.scalar_type());
    args = {
        .forward = in.args,
        .grad = grad.const_data_ptr(),
        .dq = dq.mutable_data_ptr(),
        .dk = dk.mutable_data_ptr(),
        .dv = dv.mutable_data_ptr(),
    };
  }

  std::tuple<Tensor, Tensor, Tensor> results() const { return {dq, dk, dv}; }
};

}  // namespace uz

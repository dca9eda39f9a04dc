#include <optional>
#include <tuple>

#include "common/bind.h"
#include "retention/kernels.h"

namespace uz {
namespace {

constexpr int64_t kChunk = 64;  // scores, operands and state of one head in L1 and L2

int64_t chunk_of(std::optional<int64_t> chunk, int64_t length) {
  const int64_t size = chunk.value_or(kChunk);
  return size < length ? size : length;
}

// o = retention(a, b, c), where a and b are queries and keys of width K, and c values of width V.
Tensor run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay,
           const std::optional<Tensor>& segments, RetentionMode mode, std::optional<int64_t> chunk) {
  const char* where = "ultrazoo::retention";
  check_same_shape(k, q, where);
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), where,
                  ": q, k and v have different dtypes");
  const Tensor x = torch::stable::contiguous(q), y = torch::stable::contiguous(k), z = torch::stable::contiguous(v),
               step = torch::stable::contiguous(log_decay);
  const std::optional<Tensor> documents =
      segments ? std::optional<Tensor>(torch::stable::contiguous(*segments)) : std::nullopt;
  Tensor o = empty_contiguous(v, v.scalar_type());
  if (o.numel() == 0) return o;
  const Retention args = {
      .q = x.const_data_ptr(),
      .k = y.const_data_ptr(),
      .v = z.const_data_ptr(),
      .o = o.mutable_data_ptr(),
      .log_decay = step.const_data_ptr<float>(),
      .segments = documents ? documents->const_data_ptr<int64_t>() : nullptr,
      .length = q.size(1),
      .heads = q.size(2),
      .key = q.size(3),
      .value = v.size(3),
      .chunk = chunk_of(chunk, q.size(1)),
      .dtype = dtype_of(q, where),
      .mode = mode,
  };
  torch::stable::parallel_for(0, q.size(0) * q.size(2), 1,
                              [&](int64_t begin, int64_t end) { retention_kernels().retention(args, begin, end); });
  return o;
}

Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay,
               const std::optional<Tensor>& segments, bool causal, std::optional<int64_t> chunk) {
  return run(q, k, v, log_decay, segments, causal ? RetentionMode::causal : RetentionMode::both, chunk);
}

// dq_n = sum_m decay (grad_n . v_m) k_m, dk_m = sum_n decay (v_m . grad_n) q_n and dv_m = sum_n decay (k_m . q_n)
// grad_n: three retentions, the last two against the direction of the first.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& log_decay, const std::optional<Tensor>& segments, bool causal,
                                            std::optional<int64_t> chunk) {
  const RetentionMode with = causal ? RetentionMode::causal : RetentionMode::both;
  const RetentionMode against = causal ? RetentionMode::anticausal : RetentionMode::both;
  return {run(grad, v, k, log_decay, segments, with, chunk), run(v, grad, q, log_decay, segments, against, chunk),
          run(k, q, grad, log_decay, segments, against, chunk)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ultrazoo, CPU, m) {
  m.impl("retention", TORCH_BOX(&forward));
  m.impl("retention_backward", TORCH_BOX(&backward));
}

}  // namespace uz

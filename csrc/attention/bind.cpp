#include <optional>
#include <tuple>

#include "attention/kernels.h"
#include "common/bind.h"
#include "common/documents.h"

namespace uz {
namespace {

// x (batch, rows, heads, width), with elements of a row together.
Tensor rowwise(const Tensor& x) {
  return x.dim() == 4 && (x.size(3) == 1 || x.stride(3) == 1) ? x : torch::stable::contiguous(x);
}

HeadRows rows_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.size(3)}; }

Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
}

// The arguments of both passes, alive; o and lse are yet to be set.
struct Inputs {
  Tensor q, k, v;
  std::optional<Tensor> segments;
  Arguments checks;
  Attention args;

  Inputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, const std::optional<Tensor>& segments_,
         const Tensor& seed, int64_t keep, double scale, int64_t prefix, bool sigmoid, const char* where)
      : q(rowwise(q_)), k(rowwise(k_)), v(rowwise(v_)), segments(contiguous(segments_)), checks(where, q_) {
    checks.tensor("q", q, "B, L, H, K");
    checks.range<int64_t>("prefix", prefix, 0, int64_t{1} << 40);
    checks.size("P + L", prefix + q.size(1));
    checks.tensor("k", k, "B, P + L, H, K", q.scalar_type());
    checks.tensor("v", v, "B, P + L, H, V", q.scalar_type());
    checks.tensor("segments", segments, "B, L", ScalarType::Long);
    checks.tensor("seed", seed, "", ScalarType::Long);
    checks.range<int64_t>("keep", keep, 1, 65536);
    checks.finite("scale", scale);
    args = {
        .q = rows_of(q),
        .k = rows_of(k),
        .v = rows_of(v),
        .o = nullptr,
        .lse = nullptr,
        .segments = segments ? segments->const_data_ptr<int64_t>() : nullptr,
        .length = q.size(1),
        .heads = q.size(2),
        .prefix = prefix,
        .seed = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()),
        .keep = keep,
        .scale = static_cast<float>(scale),
        .dtype = dtype_of(q, where),
        .sigmoid = sigmoid,
    };
  }

  int64_t items() const { return args.length + args.prefix > 0 ? q.size(0) * args.heads : 0; }
};

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const std::optional<Tensor>& segments, const Tensor& seed, int64_t keep,
                                   double scale, int64_t prefix, bool sigmoid) {
  const char* where = "ultrazoo::attention";
  const Documents documents(segments, where);
  Inputs in(documents.close(q), documents.close(k, prefix), documents.close(v, prefix), documents.segments(), seed,
            keep, scale, prefix, sigmoid, where);
  const int64_t batch = q.size(0), length = in.args.length, heads = in.args.heads;
  Tensor o = new_empty(q, {batch, length, heads, v.size(3)}, q.scalar_type());
  Tensor lse = new_empty(q, {sigmoid ? 0 : batch, heads, length}, ScalarType::Float);
  if (in.items() == 0) return {o, lse};
  in.args.o = o.mutable_data_ptr();
  in.args.lse = lse.mutable_data_ptr<float>();
  const AttentionKernels& kernels = attention_kernels();
  parallel_with_scratch(
      q, in.items(), kernels.scratch_floats(in.args),
      [&](float* scratch, int64_t begin, int64_t end) { kernels.forward(in.args, scratch, begin, end); });
  return {documents.open(o), lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& o, const Tensor& lse, const std::optional<Tensor>& segments,
                                            const Tensor& seed, int64_t keep, double scale, int64_t prefix,
                                            bool sigmoid) {
  const char* where = "ultrazoo::attention_backward";
  const Documents documents(segments, where);
  Inputs in(documents.close(q), documents.close(k, prefix), documents.close(v, prefix), documents.segments(), seed,
            keep, scale, prefix, sigmoid, where);
  in.checks.tensor("grad", grad, "B, L, H, V", q.scalar_type());
  in.checks.tensor("o", o, "B, L, H, V", q.scalar_type());
  in.checks.tensor("lse", lse, sigmoid ? "0, H, L" : "B, H, L", ScalarType::Float);
  const Tensor rows = rowwise(documents.close(grad)), output = torch::stable::contiguous(documents.close(o)),
               sums = torch::stable::contiguous(lse);
  Tensor dq = empty_contiguous(q, q.scalar_type()), dk = empty_contiguous(k, q.scalar_type()),
         dv = empty_contiguous(v, q.scalar_type());
  if (in.items() == 0) return {dq, dk, dv};
  in.args.o = const_cast<void*>(output.const_data_ptr());
  in.args.lse = const_cast<float*>(sums.const_data_ptr<float>());
  const AttentionBackward args = {
      .forward = in.args,
      .grad = rows_of(rows),
      .dq = dq.mutable_data_ptr(),
      .dk = dk.mutable_data_ptr(),
      .dv = dv.mutable_data_ptr(),
  };
  const AttentionKernels& kernels = attention_kernels();
  parallel_with_scratch(
      q, in.items(), kernels.backward_scratch_floats(args),
      [&](float* scratch, int64_t begin, int64_t end) { kernels.backward(args, scratch, begin, end); });
  return {documents.open(dq), documents.open(dk, prefix), documents.open(dv, prefix)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ultrazoo, CPU, m) {
  m.impl("attention", TORCH_BOX(&forward));
  m.impl("attention_backward", TORCH_BOX(&backward));
}

}  // namespace uz

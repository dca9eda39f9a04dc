#include <optional>
#include <tuple>
#include <vector>

#include "common/bind.h"
#include "selective_scan/kernels.h"

namespace uz {
namespace {

using Optional = std::optional<Tensor>;

Optional contiguous(const Optional& x) { return x ? Optional(torch::stable::contiguous(*x)) : std::nullopt; }

template <class T>
const T* pointer(const Optional& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}

Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), type);
}

// The inputs, contiguous and alive, and the kernel's view of them.
struct Inputs {
  Tensor u, delta, A, B, C;
  Optional D, z, bias, segments;
  SelectiveScan args;

  Inputs(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
         const Optional& D_, const Optional& z_, const Optional& bias_, bool softplus, const Optional& segments_,
         bool reverse, const char* where)
      : u(torch::stable::contiguous(u_)),
        delta(torch::stable::contiguous(delta_)),
        A(torch::stable::contiguous(A_)),
        B(torch::stable::contiguous(B_)),
        C(torch::stable::contiguous(C_)),
        D(contiguous(D_)),
        z(contiguous(z_)),
        bias(contiguous(bias_)),
        segments(contiguous(segments_)) {
    check_same_shape(delta, u, where);
    check_same_shape(C, B, where);
    if (z) check_same_shape(*z, u, where);
    STD_TORCH_CHECK(A.scalar_type() == ScalarType::Float, where, ": got A of dtype ", A.scalar_type(),
                    ", expected float32");
    for (const Tensor* x : {&delta, &B, &C, z ? &*z : &u})
      STD_TORCH_CHECK(x->scalar_type() == u.scalar_type(), where, ": u, delta, B, C and z have different dtypes");
    args = {
        .u = u.const_data_ptr(),
        .delta = delta.const_data_ptr(),
        .z = z ? z->const_data_ptr() : nullptr,
        .B = B.const_data_ptr(),
        .C = C.const_data_ptr(),
        .A = A.const_data_ptr<float>(),
        .D = pointer<float>(D),
        .bias = pointer<float>(bias),
        .segments = pointer<int64_t>(segments),
        .y = nullptr,
        .states = nullptr,
        .batch = u.size(0),
        .length = u.size(1),
        .dim = u.size(2),
        .state = A.size(1),
        .dtype = dtype_of(u, where),
        .softplus = softplus,
        .reverse = reverse,
    };
  }

  int64_t items() const { return args.batch * selective_scan_kernels().groups(args.dim); }
};

std::tuple<Tensor, Tensor> forward(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                   const Tensor& C, const Optional& D, const Optional& z, const Optional& bias,
                                   bool softplus, const Optional& segments, bool reverse) {
  Inputs in(u, delta, A, B, C, D, z, bias, softplus, segments, reverse, "ultrazoo::selective_scan");
  const int64_t chunks = (in.args.length + kScanChunk - 1) / kScanChunk;
  Tensor y = empty_contiguous(u, u.scalar_type());
  Tensor states = empty(u, {in.args.batch, chunks, in.args.state, in.args.dim}, ScalarType::Float);
  if (y.numel() == 0) return {y, states};
  in.args.y = y.mutable_data_ptr();
  in.args.states = states.mutable_data_ptr<float>();
  const SelectiveScanKernels& kernels = selective_scan_kernels();
  parallel_with_scratch(
      u, in.items(), kernels.scratch_floats(in.args),
      [&](float* scratch, int64_t begin, int64_t end) { kernels.forward(in.args, scratch, begin, end); });
  return {y, states};
}

// The sum over the first dimension, always in the same order, in another dtype.
Tensor sum_first(Tensor& parts, ScalarType type) {
  const std::vector<int64_t> first = {0};
  return torch::stable::to(torch::stable::sum(parts, torch::headeronly::IntHeaderOnlyArrayRef(first)), type);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& states, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
    const Tensor& C, const Optional& D, const Optional& z, const Optional& bias, bool softplus,
    const Optional& segments, bool reverse) {
  const char* where = "ultrazoo::selective_scan_backward";
  Inputs in(u, delta, A, B, C, D, z, bias, softplus, segments, reverse, where);
  const Tensor g = torch::stable::contiguous(grad), kept = torch::stable::contiguous(states);
  check_same_shape(g, u, where);
  const int64_t batch = in.args.batch, length = in.args.length, dim = in.args.dim, state = in.args.state;
  const int64_t groups = selective_scan_kernels().groups(dim);
  const ScalarType wide = ScalarType::Float, type = u.scalar_type();
  Tensor du = empty_contiguous(u, type), ddelta = empty_contiguous(u, type);
  Tensor dz = z ? empty_contiguous(u, type) : empty(u, {0}, type);
  Tensor dB = empty(u, {groups, batch, length, state}, wide), dC = empty(u, {groups, batch, length, state}, wide);
  Tensor dA = empty(u, {batch, dim, state}, wide), dD = empty(u, {batch, dim}, wide);
  Tensor dbias = empty(u, {batch, dim}, wide);
  in.args.states = const_cast<float*>(kept.const_data_ptr<float>());  // read only
  const SelectiveScanBackward args = {
      .forward = in.args,
      .grad = g.const_data_ptr(),
      .du = du.mutable_data_ptr(),
      .ddelta = ddelta.mutable_data_ptr(),
      .dz = dz.mutable_data_ptr(),
      .dB = dB.mutable_data_ptr<float>(),
      .dC = dC.mutable_data_ptr<float>(),
      .dA = dA.mutable_data_ptr<float>(),
      .dD = dD.mutable_data_ptr<float>(),
      .dbias = dbias.mutable_data_ptr<float>(),
  };
  const int64_t items = length > 0 ? in.items() : 0;
  if (items == 0) torch::stable::zero_(dA), torch::stable::zero_(dD), torch::stable::zero_(dbias);
  const SelectiveScanKernels& kernels = selective_scan_kernels();
  parallel_with_scratch(
      u, items, kernels.backward_scratch_floats(args),
      [&](float* scratch, int64_t begin, int64_t end) { kernels.backward(args, scratch, begin, end); });
  return {du,
          ddelta,
          sum_first(dA, wide),
          sum_first(dB, type),
          sum_first(dC, type),
          D ? sum_first(dD, wide) : empty(u, {0}, wide),
          dz,
          bias ? sum_first(dbias, wide) : empty(u, {0}, wide)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ultrazoo, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&forward));
  m.impl("selective_scan_backward", TORCH_BOX(&backward));
}

}  // namespace uz

// What every device's binding of the selective scan shares: checks, contiguous inputs, results, the kernels' arguments.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "common/bind.h"
#include "selective_scan/kernels.h"

namespace uz {

// The inputs, contiguous and alive, and the kernel's view of them.
struct ScanInputs {
  Tensor u, delta, A, B, C;
  Optional D, z, bias, segments;
  Arguments checks;
  SelectiveScan args;

  ScanInputs(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
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
        segments(contiguous(segments_)),
        checks(where, u_) {
    const ScalarType type = u.scalar_type(), wide = ScalarType::Float;
    checks.tensor("u", u, "batch, length, dim");
    checks.tensor("delta", delta, "batch, length, dim", type);
    checks.tensor("A", A, "dim, state", wide);
    checks.tensor("B", B, "batch, length, state", type);
    checks.tensor("C", C, "batch, length, state", type);
    checks.tensor("D", D, "dim", wide);
    checks.tensor("z", z, "batch, length, dim", type);
    checks.tensor("delta_bias", bias, "dim", wide);
    checks.tensor("segments", segments, "batch, length", ScalarType::Long);
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

 private:
  template <class T>
  static const T* pointer(const Optional& x) {
    return x ? x->const_data_ptr<T>() : nullptr;
  }
};

struct ScanOutputs {
  Tensor y, states;
};

inline int64_t chunks_of(const ScanInputs& in) { return (in.args.length + kScanChunk - 1) / kScanChunk; }

// What the forward returns, to be filled through in.args.
inline ScanOutputs scan_outputs(ScanInputs& in) {
  ScanOutputs out = {empty_contiguous(in.u, in.u.scalar_type()),
                     empty(in.u, {in.args.batch, chunks_of(in), in.args.state, in.args.dim}, ScalarType::Float)};
  in.args.y = out.y.mutable_data_ptr();
  in.args.states = out.states.mutable_data_ptr<float>();
  return out;
}

// The gradients, to be filled through args: those of B and C for each of `groups` of channels, those of A, D and the
// bias for each row.
struct ScanGradients {
  Tensor grad, kept;  // contiguous inputs
  Tensor du, ddelta, dz, dA, dB, dC, dD, dbias;
  SelectiveScanBackward args;

  ScanGradients(ScanInputs& in, const Tensor& grad_, const Tensor& states, int64_t groups)
      : grad(torch::stable::contiguous(grad_)), kept(torch::stable::contiguous(states)) {
    const int64_t batch = in.args.batch, length = in.args.length, dim = in.args.dim, state = in.args.state;
    const ScalarType wide = ScalarType::Float, type = in.u.scalar_type();
    in.checks.tensor("grad", grad, "batch, length, dim", type);
    in.checks.size("ceil(length / 32)", chunks_of(in));
    in.checks.tensor("states", kept, "batch, ceil(length / 32), state, dim", wide);
    du = empty_contiguous(in.u, type), ddelta = empty_contiguous(in.u, type);
    dz = in.z ? empty_contiguous(in.u, type) : empty(in.u, {0}, type);
    dB = empty(in.u, {groups, batch, length, state}, wide), dC = empty(in.u, {groups, batch, length, state}, wide);
    dA = empty(in.u, {batch, dim, state}, wide), dD = empty(in.u, {batch, dim}, wide);
    dbias = empty(in.u, {batch, dim}, wide);
    if (in.u.numel() == 0) torch::stable::zero_(dA), torch::stable::zero_(dD), torch::stable::zero_(dbias);
    in.args.states = const_cast<float*>(kept.const_data_ptr<float>());  // read only
    args = {
        .forward = in.args,
        .grad = grad.const_data_ptr(),
        .du = du.mutable_data_ptr(),
        .ddelta = ddelta.mutable_data_ptr(),
        .dz = dz.mutable_data_ptr(),
        .dB = dB.mutable_data_ptr<float>(),
        .dC = dC.mutable_data_ptr<float>(),
        .dA = dA.mutable_data_ptr<float>(),
        .dD = dD.mutable_data_ptr<float>(),
        .dbias = dbias.mutable_data_ptr<float>(),
    };
  }

  // As the op returns them: the parts are added up, always in the same order.
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> results(const ScanInputs& in) {
    const ScalarType wide = ScalarType::Float, type = in.u.scalar_type();
    return {du,
            ddelta,
            sum_first(dA, wide),
            sum_first(dB, type),
            sum_first(dC, type),
            in.D ? sum_first(dD, wide) : empty(in.u, {0}, wide),
            dz,
            in.bias ? sum_first(dbias, wide) : empty(in.u, {0}, wide)};
  }

 private:
  // The sum over the first dimension, in another dtype.
  static Tensor sum_first(Tensor& parts, ScalarType type) {
    const std::vector<int64_t> first = {0};
    return torch::stable::to(torch::stable::sum(parts, torch::headeronly::IntHeaderOnlyArrayRef(first)), type);
  }
};

}  // namespace uz

#include "common/bind_cuda.h"
#include "selective_scan/inputs.h"

namespace uz::cuda {
namespace {

// The kernels number channels, chunks and blocks in 32 bits.
void check_sizes(const SelectiveScan& a, const char* where) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (a.batch > kMost || a.dim > kMost || a.state > kMost || a.length > kMost || a.batch * a.dim > kMost)
    fail(where, ": got batch ", a.batch, ", length ", a.length, ", dim ", a.dim, ", state ", a.state,
         ", expected each of them and batch * dim to be at most 2^30");
}

std::tuple<Tensor, Tensor> forward(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                   const Tensor& C, const Optional& D, const Optional& z, const Optional& bias,
                                   bool softplus, const Optional& segments, bool reverse) {
  const char* where = "ultrazoo::selective_scan";
  ScanInputs in(u, delta, A, B, C, D, z, bias, softplus, segments, reverse, where);
  check_sizes(in.args, where);
  const ScanOutputs out = scan_outputs(in);
  if (out.y.numel() > 0) on_device_of(u, where, [&](Stream stream) { return selective_scan_forward(in.args, stream); });
  return {out.y, out.states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& states, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
    const Tensor& C, const Optional& D, const Optional& z, const Optional& bias, bool softplus,
    const Optional& segments, bool reverse) {
  const char* where = "ultrazoo::selective_scan_backward";
  ScanInputs in(u, delta, A, B, C, D, z, bias, softplus, segments, reverse, where);
  check_sizes(in.args, where);
  ScanGradients out(in, grad, states, selective_scan_groups(in.args));
  Tensor carry = empty(u, {in.args.batch, in.args.state, in.args.dim}, ScalarType::Float);
  if (u.numel() > 0)
    on_device_of(u, where, [&](Stream stream) {
      return selective_scan_backward(out.args, carry.mutable_data_ptr<float>(), stream);
    });
  return out.results(in);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ultrazoo, UZ_CUDA_KEY, m) {
  m.impl("selective_scan", TORCH_BOX(&forward));
  m.impl("selective_scan_backward", TORCH_BOX(&backward));
}

}  // namespace uz::cuda

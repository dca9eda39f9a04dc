#include "common/documents.h"
#include "selective_scan/inputs.h"

namespace uz {
namespace {

int64_t items_of(const SelectiveScan& a) { return a.batch * selective_scan_kernels().groups(a.dim); }

std::tuple<Tensor, Tensor> forward(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                   const Tensor& C, const Optional& D, const Optional& z, const Optional& bias,
                                   bool softplus, const Optional& segments, bool reverse) {
  const char* where = "ultrazoo::selective_scan";
  check_documents(segments, where);
  ScanInputs in(u, delta, A, B, C, D, z, bias, softplus, segments, reverse, where);
  const ScanOutputs out = scan_outputs(in);
  if (out.y.numel() == 0) return {out.y, out.states};
  const SelectiveScanKernels& kernels = selective_scan_kernels();
  parallel_with_scratch(
      u, items_of(in.args), kernels.scratch_floats(in.args),
      [&](float* scratch, int64_t begin, int64_t end) { kernels.forward(in.args, scratch, begin, end); });
  return {out.y, out.states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& states, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
    const Tensor& C, const Optional& D, const Optional& z, const Optional& bias, bool softplus,
    const Optional& segments, bool reverse) {
  const SelectiveScanKernels& kernels = selective_scan_kernels();
  const char* where = "ultrazoo::selective_scan_backward";
  check_documents(segments, where);
  ScanInputs in(u, delta, A, B, C, D, z, bias, softplus, segments, reverse, where);
  ScanGradients out(in, grad, states, kernels.groups(in.args.dim));
  parallel_with_scratch(
      u, in.args.length > 0 ? items_of(in.args) : 0, kernels.backward_scratch_floats(out.args),
      [&](float* scratch, int64_t begin, int64_t end) { kernels.backward(out.args, scratch, begin, end); });
  return out.results(in);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ultrazoo, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&forward));
  m.impl("selective_scan_backward", TORCH_BOX(&backward));
}

}  // namespace uz

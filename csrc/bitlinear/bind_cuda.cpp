#include "common/bind_cuda.h"
#include "bitlinear/inputs.h"

namespace uz::cuda {
namespace {

// mean |weight| stays on the device: nothing here waits for it.
struct Scale {
  Tensor sums, value;  // scratch, the scale itself
  WeightScale args;
};

Scale scale_of(const Tensor& weight, double eps) {
  Scale s = {empty(weight, {kPartialSums}, ScalarType::Double), empty(weight, {1}, ScalarType::Float), {}};
  s.args = {
      .sums = s.sums.mutable_data_ptr<double>(),
      .value = s.value.mutable_data_ptr<float>(),
      .eps = static_cast<float>(eps),
  };
  return s;
}

Error first(Error a, Error b) { return a != nullptr ? a : b; }

Tensor packed_forward(const Tensor& x, const Tensor& packed, const Tensor& scale, const Optional& bias, double eps) {
  const char* where = "ultrazoo::bitlinear_packed";
  check_packed(x, packed, scale, bias, eps, where);
  const Tokens tokens = tokens_of(x, x.size(x.dim() - 1), eps, where);
  Tensor tile = torch::stable::contiguous(packed);
  const Tensor rows = torch::stable::contiguous(scale);
  if (reinterpret_cast<uintptr_t>(tile.const_data_ptr()) % 16 != 0) tile = torch::stable::clone(tile);
  Product p = product_of(tokens, x, tile.const_data_ptr<uint8_t>(), bias, scale.size(0), where);
  p.args.row_scale = rows.const_data_ptr<float>();
  on_device_of(x, where, [&](Stream stream) {
    const Error error = bitlinear_quantize(tokens.args, tokens.count, stream);
    return first(error, bitlinear_product(p.args, nullptr, stream));
  });
  return p.y;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Optional& bias, double eps) {
  const char* where = "ultrazoo::bitlinear";
  check_forward(x, weight, bias, eps, where);
  const Tensor w = torch::stable::contiguous(weight);
  Tokens tokens = tokens_of(x, w.size(1), eps, where);
  Ternary args = ternary_of(w, where);
  const Scale scale = scale_of(w, eps);
  Tensor packed = empty_packed(x, args.rows, args.columns);
  args.packed = packed.mutable_data_ptr<uint8_t>();
  const Product p = product_of(tokens, x, args.packed, bias, args.rows, where);
  on_device_of(x, where, [&](Stream stream) {
    Error error = bitlinear_quantize(tokens.args, tokens.count, stream);
    error = first(error, bitlinear_ternarize(args, scale.args, stream));
    return first(error, bitlinear_product(p.args, scale.args.value, stream));
  });
  const auto [integers, token_scale] = quantized(tokens, x);
  return {p.y, integers, token_scale};
}

// dx = grad codes scale, dW = grad^T (integers token_scale), products in bfloat16 for bfloat16 gradients, else in fp32.
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& integers, const Tensor& token_scale,
                                    const Tensor& weight, double eps) {
  const char* where = "ultrazoo::bitlinear_backward";
  check_backward(grad, integers, token_scale, weight, eps, where);
  const Factors f = factors_of(grad, integers, token_scale, weight);
  const DType type = dtype_of(f.type, where);
  Ternary args = ternary_of(f.weight, where);
  const Scale scale = scale_of(f.weight, eps);
  args.codes = f.codes.mutable_data_ptr();
  args.codes_dtype = type;
  const Dequantize tokens = {
      .integers = f.integers.const_data_ptr<int8_t>(),
      .scale = f.token_scale.const_data_ptr<float>(),
      .x = f.x.mutable_data_ptr(),
      .tokens = f.tokens,
      .columns = f.columns,
      .dtype = type,
  };
  on_device_of(grad, where, [&](Stream stream) {
    const Error error = bitlinear_ternarize(args, scale.args, stream);
    return first(error, bitlinear_dequantize(tokens, stream));
  });
  Tensor dx = matmul(f.grad, f.codes, where);
  on_device_of(grad, where, [&](Stream stream) {
    return bitlinear_scale(dx.mutable_data_ptr(), type, scale.args.value, dx.numel(), stream);
  });
  return gradients(f, dx, integers, grad, weight, where);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ultrazoo, UZ_CUDA_KEY, m) {
  m.impl("bitlinear", TORCH_BOX(&forward));
  m.impl("bitlinear_backward", TORCH_BOX(&backward));
  m.impl("bitlinear_packed", TORCH_BOX(&packed_forward));
}

}  // namespace uz::cuda

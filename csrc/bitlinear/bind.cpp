#include "bitlinear/inputs.h"

namespace uz {
namespace {

constexpr int64_t kGrain = 1 << 15;  // numbers that are worth a thread

int64_t grain(int64_t numbers_each) { return numbers_each < kGrain ? kGrain / numbers_each : 1; }

Tokens quantize(const Tensor& x, int64_t columns, double eps, const char* where) {
  Tokens t = tokens_of(x, columns, eps, where);
  torch::stable::parallel_for(0, t.count, grain(columns),
                              [&](int64_t begin, int64_t end) { bitlinear_kernels().quantize(t.args, begin, end); });
  return t;
}

// max(mean |weight|, eps); the rows are summed up in their order, whatever the threads.
float weight_scale(const Ternary& args, const Tensor& like, double eps) {
  Tensor sums = empty(like, {args.rows}, ScalarType::Double);
  double* sum = sums.mutable_data_ptr<double>();
  torch::stable::parallel_for(0, args.rows, grain(args.columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) sum[row] = bitlinear_kernels().absolute_sum(args, row);
  });
  double total = 0;
  for (int64_t row = 0; row < args.rows; ++row) total += sum[row];
  const float mean = static_cast<float>(total / (static_cast<double>(args.rows) * static_cast<double>(args.columns)));
  return mean < static_cast<float>(eps) ? static_cast<float>(eps) : mean;
}

void ternarize(const Ternary& args) {
  torch::stable::parallel_for(0, tiles(args.rows), grain(args.columns * kTile),
                              [&](int64_t begin, int64_t end) { bitlinear_kernels().ternarize(args, begin, end); });
}

void multiply(const PackedProduct& args) {
  const int64_t group_rows = kTileRows * kTile, panels = (args.tokens + kTokenPanel - 1) / kTokenPanel;
  const int64_t together = args.tokens < kTokenPanel ? args.tokens : kTokenPanel;
  torch::stable::parallel_for(0, panels * ((args.rows + group_rows - 1) / group_rows),
                              grain(args.columns * group_rows / 16 * (together > 0 ? together : 1)),
                              [&](int64_t begin, int64_t end) { bitlinear_kernels().product(args, begin, end); });
}

Tensor packed_forward(const Tensor& x, const Tensor& packed, const Tensor& scale, const Optional& bias, double eps) {
  const char* where = "ultrazoo::bitlinear_packed";
  check_packed(x, packed, scale, bias, eps, where);
  const Tokens tokens = quantize(x, x.size(x.dim() - 1), eps, where);
  const Tensor tile = torch::stable::contiguous(packed), rows = torch::stable::contiguous(scale);
  Product p = product_of(tokens, x, tile.const_data_ptr<uint8_t>(), bias, scale.size(0), where);
  p.args.row_scale = rows.const_data_ptr<float>();
  multiply(p.args);
  return p.y;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Optional& bias, double eps) {
  const char* where = "ultrazoo::bitlinear";
  check_forward(x, weight, bias, eps, where);
  const Tensor w = torch::stable::contiguous(weight);
  Tokens tokens = quantize(x, w.size(1), eps, where);
  Ternary args = ternary_of(w, where);
  const float scale = weight_scale(args, w, eps);
  Tensor packed = empty_packed(x, args.rows, args.columns);
  args.inverse = 1.0f / scale;
  args.packed = packed.mutable_data_ptr<uint8_t>();
  ternarize(args);
  Product p = product_of(tokens, x, args.packed, bias, args.rows, where);
  p.args.one_scale = scale;
  multiply(p.args);
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
  const float scale = weight_scale(args, f.weight, eps);
  args.inverse = 1.0f / scale;
  args.codes = f.codes.mutable_data_ptr();
  args.codes_dtype = type;
  ternarize(args);
  torch::stable::parallel_for(0, f.tokens, grain(f.columns), [&](int64_t begin, int64_t end) {
    bitlinear_kernels().dequantize(f.integers.const_data_ptr<int8_t>(), f.token_scale.const_data_ptr<float>(),
                                   f.columns, f.x.mutable_data_ptr(), type, begin, end);
  });
  Tensor dx = matmul(f.grad, f.codes, where);
  void* scaled = dx.mutable_data_ptr();
  torch::stable::parallel_for(0, dx.numel(), kGrain, [&](int64_t begin, int64_t end) {
    bitlinear_kernels().scale(scaled, dtype_of(f.type, where), scale, begin, end);
  });
  return gradients(f, dx, integers, grad, weight, where);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ultrazoo, CPU, m) {
  m.impl("bitlinear", TORCH_BOX(&forward));
  m.impl("bitlinear_backward", TORCH_BOX(&backward));
  m.impl("bitlinear_packed", TORCH_BOX(&packed_forward));
}

}  // namespace uz

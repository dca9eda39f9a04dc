#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "bitlinear/kernels.h"
#include "common/bind.h"

namespace uz {
namespace {

using Optional = std::optional<Tensor>;
constexpr int64_t kGrain = 1 << 15;                 // numbers that are worth a thread
constexpr int64_t kMostColumns = 0x7fffffff / 256;  // codes of 0, 1, 2 times integers of up to 128

int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }

int64_t grain(int64_t numbers_each) { return numbers_each < kGrain ? kGrain / numbers_each : 1; }

Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), type);
}

struct Tokens {
  Tensor integers, scale, sum;  // (tokens, stride), (tokens,), (tokens,)
  int64_t count, columns, stride;
};

Tokens quantize(const Tensor& x, int64_t columns, double eps, const char* where) {
  STD_TORCH_CHECK(columns <= kMostColumns, where, ": got ", columns, " columns, expected at most ", kMostColumns,
                  ", for the sums to fit int32");
  const Tensor from = torch::stable::contiguous(x);
  const int64_t count = columns > 0 ? x.numel() / columns : 0, stride = tiles(columns) * kTile;
  Tokens t = {empty(x, {count, stride}, ScalarType::Char),
              empty(x, {count}, ScalarType::Float),
              empty(x, {count}, ScalarType::Int),
              count,
              columns,
              stride};
  const Quantize args = {
      .x = from.const_data_ptr(),
      .integers = t.integers.mutable_data_ptr<int8_t>(),
      .scale = t.scale.mutable_data_ptr<float>(),
      .sum = t.sum.mutable_data_ptr<int32_t>(),
      .columns = columns,
      .stride = stride,
      .dtype = dtype_of(x, where),
      .eps = static_cast<float>(eps),
  };
  torch::stable::parallel_for(0, count, grain(columns),
                              [&](int64_t begin, int64_t end) { bitlinear_kernels().quantize(args, begin, end); });
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

Tensor product(const Tokens& tokens, const Tensor& x, const uint8_t* packed, const float* row_scale, float one_scale,
               const Optional& bias, int64_t rows, const char* where) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = rows;
  Tensor y = empty(x, sizes, x.scalar_type());
  const Optional offset = bias ? Optional(torch::stable::contiguous(*bias)) : std::nullopt;
  const PackedProduct args = {
      .integers = tokens.integers.const_data_ptr<int8_t>(),
      .token_scale = tokens.scale.const_data_ptr<float>(),
      .token_sum = tokens.sum.const_data_ptr<int32_t>(),
      .packed = packed,
      .row_scale = row_scale,
      .bias = offset ? offset->const_data_ptr() : nullptr,
      .y = y.mutable_data_ptr(),
      .tokens = tokens.count,
      .rows = rows,
      .columns = tokens.columns,
      .stride = tokens.stride,
      .dtype = dtype_of(x, where),
      .bias_dtype = bias ? dtype_of(*bias, where) : DType::fp32,
      .one_scale = one_scale,
  };
  const int64_t group_rows = kTileRows * kTile, panels = (tokens.count + kTokenPanel - 1) / kTokenPanel;
  const int64_t together = tokens.count < kTokenPanel ? tokens.count : kTokenPanel;
  torch::stable::parallel_for(0, panels * ((rows + group_rows - 1) / group_rows),
                              grain(tokens.columns * group_rows / 16 * (together > 0 ? together : 1)),
                              [&](int64_t begin, int64_t end) { bitlinear_kernels().product(args, begin, end); });
  return y;
}

Tensor packed_forward(const Tensor& x, const Tensor& packed, const Tensor& scale, const Optional& bias, double eps) {
  const char* where = "ultrazoo::bitlinear_packed";
  const Tokens tokens = quantize(x, x.size(x.dim() - 1), eps, where);
  const Tensor tile = torch::stable::contiguous(packed), rows = torch::stable::contiguous(scale);
  return product(tokens, x, tile.const_data_ptr<uint8_t>(), rows.const_data_ptr<float>(), 0.0f, bias, scale.size(0),
                 where);
}

Ternary ternary_of(const Tensor& weight, const char* where) {
  return {
      .weight = weight.const_data_ptr(),
      .rows = weight.size(0),
      .columns = weight.size(1),
      .dtype = dtype_of(weight, where),
      .inverse = 0.0f,
      .packed = nullptr,
      .codes = nullptr,
      .codes_dtype = DType::fp32,
  };
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Optional& bias, double eps) {
  const char* where = "ultrazoo::bitlinear";
  const Tensor w = torch::stable::contiguous(weight);
  const int64_t rows = w.size(0), columns = w.size(1);
  Tokens tokens = quantize(x, columns, eps, where);
  Ternary args = ternary_of(w, where);
  const float scale = weight_scale(args, w, eps);
  Tensor packed = empty(x, {tiles(rows), tiles(columns), 64}, ScalarType::Byte);
  args.inverse = 1.0f / scale;
  args.packed = packed.mutable_data_ptr<uint8_t>();
  ternarize(args);
  Tensor y = product(tokens, x, args.packed, nullptr, scale, bias, rows, where);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  Tensor integers = torch::stable::reshape(
      torch::stable::contiguous(tokens.stride == columns ? tokens.integers
                                                         : torch::stable::narrow(tokens.integers, 1, 0, columns)),
      torch::headeronly::IntHeaderOnlyArrayRef(sizes));
  sizes.back() = 1;
  return {y, integers, torch::stable::reshape(tokens.scale, torch::headeronly::IntHeaderOnlyArrayRef(sizes))};
}

// dx = grad codes scale, dW = grad^T (integers token_scale), products in bfloat16 for bfloat16 gradients, else in fp32.
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& integers, const Tensor& token_scale,
                                    const Tensor& weight, double eps) {
  const char* where = "ultrazoo::bitlinear_backward";
  const Tensor w = torch::stable::contiguous(weight), q = torch::stable::contiguous(integers),
               steps = torch::stable::contiguous(token_scale);
  const int64_t rows = w.size(0), columns = w.size(1), tokens = q.numel() / columns;
  const ScalarType type = grad.scalar_type() == ScalarType::BFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  std::vector<int64_t> sizes = {tokens, rows};
  const Tensor g =
      torch::stable::to(torch::stable::reshape(grad, torch::headeronly::IntHeaderOnlyArrayRef(sizes)), type);
  Ternary args = ternary_of(w, where);
  const float scale = weight_scale(args, w, eps);
  Tensor codes = empty(g, {rows, columns}, type), x = empty(g, {tokens, columns}, type);
  args.inverse = 1.0f / scale;
  args.codes = codes.mutable_data_ptr();
  args.codes_dtype = dtype_of(type, where);
  ternarize(args);
  torch::stable::parallel_for(0, tokens, grain(columns), [&](int64_t begin, int64_t end) {
    bitlinear_kernels().dequantize(q.const_data_ptr<int8_t>(), steps.const_data_ptr<float>(), columns,
                                   x.mutable_data_ptr(), dtype_of(type, where), begin, end);
  });
  Tensor dx = torch::stable::matmul(g, codes);
  void* scaled = dx.mutable_data_ptr();
  torch::stable::parallel_for(0, dx.numel(), kGrain, [&](int64_t begin, int64_t end) {
    bitlinear_kernels().scale(scaled, dtype_of(type, where), scale, begin, end);
  });
  const Tensor dw = torch::stable::matmul(torch::stable::transpose(g, 0, 1), x);
  return {torch::stable::to(torch::stable::reshape(dx, integers.sizes()), grad.scalar_type()),
          torch::stable::to(dw, weight.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ultrazoo, CPU, m) {
  m.impl("bitlinear", TORCH_BOX(&forward));
  m.impl("bitlinear_backward", TORCH_BOX(&backward));
  m.impl("bitlinear_packed", TORCH_BOX(&packed_forward));
}

}  // namespace uz

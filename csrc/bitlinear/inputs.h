// What every device's binding of the BitNet ops shares: checks, contiguous inputs, results, the kernels' arguments.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "bitlinear/kernels.h"
#include "common/bind.h"

namespace uz {

inline constexpr int64_t kMostColumns = 0x7fffffff / 256;    // codes of 0, 1, 2 times integers of up to 128
inline constexpr double kLeastEps = 1e-36, kMostEps = 1e18;  // 127 / eps and eps * eps are finite floats

inline int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }

inline Tensor reshaped(const Tensor& x, const std::vector<int64_t>& sizes) {
  return torch::stable::reshape(x, torch::headeronly::IntHeaderOnlyArrayRef(sizes));
}

// The sizes of x, but for the last.
inline std::vector<int64_t> sizes_with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = last;
  return sizes;
}

struct Tokens {
  Tensor from, integers, scale, sum;  // contiguous x, (tokens, stride), (tokens,), (tokens,)
  int64_t count;
  Quantize args;
};

inline void check_eps(const Arguments& args, double eps) { args.range("eps", eps, kLeastEps, kMostEps); }

// Of the training op's forward.
inline void check_forward(const Tensor& x, const Tensor& weight, const Optional& bias, double eps, const char* where) {
  Arguments args(where, x);
  args.tensor("weight", weight, "N, K");
  args.tensor("x", x, "..., K");
  args.tensor("bias", bias, "N");
  args.at_least(1, "N", args.size("N"));
  args.range("K", args.size("K"), int64_t{1}, kMostColumns);
  check_eps(args, eps);
}

inline void check_backward(const Tensor& grad, const Tensor& integers, const Tensor& token_scale, const Tensor& weight,
                           double eps, const char* where) {
  Arguments args(where, grad);
  args.tensor("weight", weight, "N, K");
  args.tensor("grad", grad, "..., N");
  args.tensor("integers", integers, "..., K", ScalarType::Char);
  args.tensor("token_scale", token_scale, "..., 1", ScalarType::Float);
  args.at_least(1, "N", args.size("N"));
  args.range("K", args.size("K"), int64_t{1}, kMostColumns);
  check_eps(args, eps);
}

inline void check_packed(const Tensor& x, const Tensor& packed, const Tensor& scale, const Optional& bias, double eps,
                         const char* where) {
  Arguments args(where, x);
  args.tensor("x", x, "..., K");
  args.tensor("scale", scale, "N", ScalarType::Float);
  args.tensor("bias", bias, "N");
  args.range("K", args.size("K"), int64_t{1}, kMostColumns);
  args.size("ceil(N / 16)", tiles(args.size("N")));
  args.size("ceil(K / 16)", tiles(args.size("K")));
  args.tensor("packed", packed, "ceil(N / 16), ceil(K / 16), 64", ScalarType::Byte);
  check_eps(args, eps);
}

// Memory for the integers of x, which args is to fill.
inline Tokens tokens_of(const Tensor& x, int64_t columns, double eps, const char* where) {
  const int64_t count = x.numel() / columns, stride = tiles(columns) * kTile;
  Tokens t = {torch::stable::contiguous(x),
              empty(x, {count, stride}, ScalarType::Char),
              empty(x, {count}, ScalarType::Float),
              empty(x, {count}, ScalarType::Int),
              count,
              {}};
  t.args = {
      .x = t.from.const_data_ptr(),
      .integers = t.integers.mutable_data_ptr<int8_t>(),
      .scale = t.scale.mutable_data_ptr<float>(),
      .sum = t.sum.mutable_data_ptr<int32_t>(),
      .columns = columns,
      .stride = stride,
      .dtype = dtype_of(x, where),
      .eps = static_cast<float>(eps),
  };
  return t;
}

// The integers and scales of x as the training op returns them, in the shape of x and without padding.
inline std::tuple<Tensor, Tensor> quantized(Tokens& tokens, const Tensor& x) {
  const int64_t columns = tokens.args.columns;
  const Tensor integers = tokens.args.stride == columns
                              ? tokens.integers
                              : torch::stable::contiguous(torch::stable::narrow(tokens.integers, 1, 0, columns));
  return {reshaped(integers, sizes_with_last(x, columns)), reshaped(tokens.scale, sizes_with_last(x, 1))};
}

// Of a contiguous weight; the caller sets what is to be written.
inline Ternary ternary_of(const Tensor& weight, const char* where) {
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

inline Tensor empty_packed(const Tensor& like, int64_t rows, int64_t columns) {
  return empty(like, {tiles(rows), tiles(columns), kTileBytes}, ScalarType::Byte);
}

struct Product {
  Tensor y;
  Optional bias;  // contiguous
  PackedProduct args;
};

// y for x, of which `tokens` are the integers; the caller sets the scale of the rows.
inline Product product_of(const Tokens& tokens, const Tensor& x, const uint8_t* packed, const Optional& bias,
                          int64_t rows, const char* where) {
  Product p = {empty(x, sizes_with_last(x, rows), x.scalar_type()), contiguous(bias), {}};
  p.args = {
      .integers = tokens.args.integers,
      .token_scale = tokens.args.scale,
      .token_sum = tokens.args.sum,
      .packed = packed,
      .row_scale = nullptr,
      .bias = p.bias ? p.bias->const_data_ptr() : nullptr,
      .y = p.y.mutable_data_ptr(),
      .tokens = tokens.count,
      .rows = rows,
      .columns = tokens.args.columns,
      .stride = tokens.args.stride,
      .dtype = dtype_of(x, where),
      .bias_dtype = bias ? dtype_of(*bias, where) : DType::fp32,
      .one_scale = 0.0f,
  };
  return p;
}

// What the backward multiplies, in bfloat16 for bfloat16 gradients, else in fp32.
struct Factors {
  ScalarType type;
  Tensor weight, integers, token_scale;  // contiguous
  int64_t rows, columns, tokens;
  Tensor grad, codes, x;  // (tokens, rows), (rows, columns), (tokens, columns) of `type`; the latter two to be filled
};

inline Factors factors_of(const Tensor& grad, const Tensor& integers, const Tensor& token_scale, const Tensor& weight) {
  const ScalarType type = grad.scalar_type() == ScalarType::BFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  const int64_t rows = weight.size(0), columns = weight.size(1), tokens = integers.numel() / columns;
  return {type,
          torch::stable::contiguous(weight),
          torch::stable::contiguous(integers),
          torch::stable::contiguous(token_scale),
          rows,
          columns,
          tokens,
          torch::stable::to(reshaped(grad, {tokens, rows}), type),
          empty(grad, {rows, columns}, type),
          empty(grad, {tokens, columns}, type)};
}

// dx and dW as the op returns them; dx is scaled already.
inline std::tuple<Tensor, Tensor> gradients(const Factors& f, const Tensor& dx, const Tensor& integers,
                                            const Tensor& grad, const Tensor& weight, const char* where) {
  const Tensor dw = matmul(torch::stable::transpose(f.grad, 0, 1), f.x, where);
  return {torch::stable::to(torch::stable::reshape(dx, integers.sizes()), grad.scalar_type()),
          torch::stable::to(dw, weight.scalar_type())};
}

}  // namespace uz

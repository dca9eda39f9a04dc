// BitNet b1.58: int8 activations per token, ternary weights of two bits in tiles of 16 x 16 (ops/bitlinear/op.py has
// the layout), integer dot products that are exact, and what the straight-through backward needs.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/types.h"

namespace uz {

inline constexpr int64_t kTile = 16;        // rows and columns of a tile
inline constexpr int64_t kTileBytes = 64;   // at two bits
inline constexpr int64_t kTokenPanel = 96;  // tokens of an item of the product
inline constexpr int64_t kTileRows = 4;     // rows of tiles of an item

struct Quantize {    // integers = clamp(round(127 x / peak)), scale = peak / 127, peak = max |x| of the token, at least
                     // eps
  const void* x;     // (tokens, columns)
  int8_t* integers;  // (tokens, stride), 0 beyond the columns
  float* scale;      // (tokens,)
  int32_t* sum;      // (tokens,), of the integers
  int64_t columns, stride;
  DType dtype;
  float eps;
};

struct Ternary {       // codes = clamp(round(weight / scale), -1, 1)
  const void* weight;  // (rows, columns)
  int64_t rows, columns;
  DType dtype;
  float inverse;    // 1 / scale
  uint8_t* packed;  // (row tiles, column tiles, 64); or null
  void* codes;      // (rows, columns) of codes_dtype; or null
  DType codes_dtype;
};

struct PackedProduct {     // y = (integers . codes) scale scale + bias
  const int8_t* integers;  // (tokens, stride)
  const float* token_scale;
  const int32_t* token_sum;
  const uint8_t* packed;
  const float* row_scale;  // (rows,); or null: one_scale for all
  const void* bias;        // (rows,); or null
  void* y;                 // (tokens, rows)
  int64_t tokens, rows, columns, stride;
  DType dtype, bias_dtype;
  float one_scale;
};

struct BitlinearKernels {
  void (*quantize)(const Quantize&, int64_t begin, int64_t end);      // tokens
  double (*absolute_sum)(const Ternary&, int64_t row);                // of one row of the weight
  void (*ternarize)(const Ternary&, int64_t begin, int64_t end);      // rows of tiles
  void (*product)(const PackedProduct&, int64_t begin, int64_t end);  // items token panel * row groups + row group
  void (*scale)(void* x, DType dtype, float by, int64_t begin, int64_t end);  // x *= by
  void (*dequantize)(const int8_t* integers, const float* scale, int64_t columns, void* x, DType dtype, int64_t begin,
                     int64_t end);  // tokens: x = integers scale
};

UZ_KERNELS_VNNI(BitlinearKernels, bitlinear_kernels)

namespace cuda {

inline constexpr int64_t kPartialSums = 512;  // at most

struct WeightScale {  // max(mean |weight|, eps), in the device's memory
  double* sums;       // (kPartialSums,) scratch
  float* value;
  float eps;
};

struct Dequantize {  // x = integers scale
  const int8_t* integers;
  const float* scale;  // (tokens,)
  void* x;             // like the integers: (tokens, columns)
  int64_t tokens, columns;
  DType dtype;
};

// The scale of a weight is known on the device alone: `inverse` of Ternary and `one_scale` of PackedProduct, which are
// the host's, are not read.
Error bitlinear_quantize(const Quantize& args, int64_t tokens, Stream stream);
Error bitlinear_ternarize(const Ternary& args, const WeightScale& scale, Stream stream);    // sets *scale.value too
Error bitlinear_product(const PackedProduct& args, const float* one_scale, Stream stream);  // where row_scale is null
Error bitlinear_dequantize(const Dequantize& args, Stream stream);
Error bitlinear_scale(void* x, DType dtype, const float* by, int64_t elements, Stream stream);  // x *= *by

}  // namespace cuda

}  // namespace uz

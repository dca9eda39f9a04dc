// Checks an op's arguments before a kernel gets pointers: shapes, dtypes, devices, numbers. The references make the
// same checks (ultrazoo/ops/arguments.py).
#pragma once

#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace uz {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A dtype's name in Python.
inline std::string name_of(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    default:
      std::ostringstream name;
      name << type;
      return name.str();
  }
}

// Sizes as Python writes them.
template <class Sizes>
std::string text_of(const Sizes& sizes) {
  std::string result;
  for (const int64_t n : sizes) result += (result.empty() ? "" : ", ") + std::to_string(n);
  return "(" + result + (sizes.size() == 1 ? ",)" : ")");
}

inline std::string shape_of(const torch::stable::Tensor& x) { return text_of(x.sizes()); }

// The arguments of one call. A shape is written in symbols, as in "B, L, H, K": the first tensor with a symbol sets its
// size, and the others must agree. "..." at the start stands for any number of dimensions, a number for itself.
class Arguments {
 public:
  using Tensor = torch::stable::Tensor;
  using ScalarType = torch::headeronly::ScalarType;

  // All tensors must be on the device of `lead`.
  Arguments(const char* op, const Tensor& lead) : op_(op), device_(lead.device()) {}

  // Sets the size of a symbol that no earlier tensor has.
  void size(const char* symbol, int64_t n) { sizes_.emplace_back(symbol, n); }

  int64_t size(const std::string& symbol) const {
    for (const auto& [known, n] : sizes_)
      if (known == symbol) return n;
    fail(op_, ": ", symbol, ": unknown symbol in a shape");
  }

  void tensor(const char* name, const Tensor& x, const char* shape, std::initializer_list<ScalarType> dtypes) {
    bool fits = false;
    for (const ScalarType type : dtypes) fits = fits || x.scalar_type() == type;
    if (!fits) {
      std::string expected;
      for (const ScalarType type : dtypes) expected += (expected.empty() ? "" : " or ") + name_of(type);
      fail(op_, ": ", name, ": got dtype ", name_of(x.scalar_type()), ", expected ", expected);
    }
    const auto leading = leading_;
    const size_t known = sizes_.size();
    if (!match(x, shape)) {
      leading_ = leading;  // what is known without x
      sizes_.resize(known);
      fail(op_, ": ", name, ": got shape ", shape_of(x), ", expected ", described(shape));
    }
    if (x.device() != device_) fail(op_, ": ", name, ": got a tensor on another device than the first argument's");
  }

  void tensor(const char* name, const Tensor& x, const char* shape, ScalarType type) { tensor(name, x, shape, {type}); }

  // Of one of the dtypes that kernels take.
  void tensor(const char* name, const Tensor& x, const char* shape) {
    tensor(name, x, shape, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  }

  template <class... Dtypes>
  void tensor(const char* name, const std::optional<Tensor>& x, const char* shape, Dtypes... dtypes) {
    if (x) tensor(name, *x, shape, dtypes...);
  }

  template <class Number>
  void range(const char* name, Number value, Number least, Number most) const {
    if (!(value >= least && value <= most)) fail(op_, ": ", name, ": got ", value, ", expected ", least, " to ", most);
  }

  void at_least(int64_t least, const char* name, int64_t value) const {
    if (value < least) fail(op_, ": ", name, ": got ", value, ", expected at least ", least);
  }

  // Finite as a float, which kernels compute with.
  void finite(const char* name, double value) const {
    if (!(std::abs(value) <= std::numeric_limits<float>::max()))
      fail(op_, ": ", name, ": got ", value, ", expected a finite float32");
  }

 private:
  static std::vector<std::string> symbols_of(const std::string& shape) {
    std::vector<std::string> symbols;
    for (size_t begin = 0; begin < shape.size();) {
      const size_t comma = shape.find(", ", begin), end = comma == std::string::npos ? shape.size() : comma;
      symbols.push_back(shape.substr(begin, end - begin));
      begin = end + 2;
    }
    return symbols;
  }

  bool match(const Tensor& x, const char* shape) {
    std::vector<std::string> symbols = symbols_of(shape);
    const auto sizes = x.sizes();
    size_t at = 0;
    if (!symbols.empty() && symbols.front() == "...") {
      symbols.erase(symbols.begin());
      if (sizes.size() < symbols.size()) return false;
      at = sizes.size() - symbols.size();
      const std::vector<int64_t> front(sizes.begin(), sizes.begin() + at);
      if (!leading_) leading_ = front;
      if (*leading_ != front) return false;
    }
    if (sizes.size() - at != symbols.size()) return false;
    for (size_t i = 0; i < symbols.size(); ++i)
      if (expected(symbols[i], sizes[at + i]) != sizes[at + i]) return false;
    return true;
  }

  // The size of a symbol, which is `found` if it has none yet.
  int64_t expected(const std::string& symbol, int64_t found) {
    if (symbol.find_first_not_of("0123456789") == std::string::npos) return std::atoll(symbol.c_str());
    for (const auto& [known, n] : sizes_)
      if (known == symbol) return n;
    sizes_.emplace_back(symbol, found);
    return found;
  }

  // The shape, and what is known of its symbols.
  std::string described(const char* shape) const {
    std::string known;
    for (const std::string& symbol : symbols_of(shape)) {
      if (symbol == "..." && leading_) known += (known.empty() ? "" : ", ") + ("... " + text_of(*leading_));
      for (const auto& [name, n] : sizes_)
        if (name == symbol) known += (known.empty() ? "" : ", ") + name + " " + std::to_string(n);
    }
    return "(" + std::string(shape) + ")" + (known.empty() ? "" : " with " + known);
  }

  const char* op_;
  torch::stable::Device device_;
  std::vector<std::pair<std::string, int64_t>> sizes_;
  std::optional<std::vector<int64_t>> leading_;
};

}  // namespace uz

// What both passes of retention share: rows of one head in fp32, powers of its
// decay, documents, and states.
#pragma once

#include <cmath>

#include "common/gemm.h"
#include "retention/kernels.h"

namespace uz::UZ_ISA {

// Fetches the rows of the next chunk into the cache while this one is computed:
// rows of one head lie far apart, where the hardware's own prefetching does not
// follow.
class Prefetch {
 public:
  explicit Prefetch(int64_t rows_at_once) : rows_at_once_(rows_at_once) {}

  void start(int64_t rows) { arrays_ = 0, row_ = 0, rows_ = rows; }
  void add(const void* first, int64_t row_bytes, int64_t stride_bytes) {
    arrays_of_[arrays_++] = {static_cast<const char*>(first), row_bytes, stride_bytes};
  }

  void operator()() {
    for (int64_t i = 0; i < rows_at_once_ && row_ < rows_; ++i, ++row_)
      for (int a = 0; a < arrays_; ++a)
        for (int64_t byte = 0; byte < arrays_of_[a].bytes; byte += 64)
          __builtin_prefetch(arrays_of_[a].first + row_ * arrays_of_[a].stride + byte);
  }

 private:
  struct Rows {
    const char* first;
    int64_t bytes, stride;
  };
  Rows arrays_of_[4] = {};
  int arrays_ = 0;
  int64_t rows_at_once_, row_ = 0, rows_ = 0;
};

// A matrix of rows x (at most) ld numbers, in fp32.
struct Block {
  float* data;
  int64_t width, ld;
  float* row(int64_t i) const { return data + i * ld; }
};

template <class T>
class Chunks {
 public:
  Chunks(const Retention& a, Arena& arena)
      : a_(a),
        ldk(round_up(a.key, kLanes)),
        ldv(round_up(a.value, kLanes)),
        ldc(round_up(a.chunk, kLanes)),
        rows(round_up(a.chunk, 4)),
        state_floats(round_up(a.key, 4) * ldv),
        turned_floats(round_up(a.value, 4) * ldk),
        power_(arena.take(a.chunk + 1)),
        decay_(arena.take(2 * ldc + a.chunk)) {}

  // document(first token of the batch, length) and padding(first token, length)
  // along a row.
  template <class Document, class Padding>
  void walk(int64_t row, const Document& document, const Padding& padding) const {
    const int64_t first = row * a_.length;
    if (a_.segments == nullptr) return document(first, a_.length);
    for (int64_t start = 0; start < a_.length;) {
      const int64_t id = a_.segments[first + start];
      int64_t stop = start + 1;
      while (stop < a_.length && a_.segments[first + stop] == id) ++stop;
      if (id == 0) {
        padding(first + start, stop - start);
      } else {
        document(first + start, stop - start);
      }
      start = stop;
    }
  }

  void set_decay(float log_decay) const {
    for (int64_t i = 0; i <= a_.chunk; ++i) power_[i] = static_cast<float>(std::exp(double(log_decay) * double(i)));
    for (int64_t i = 0; i < 2 * ldc + a_.chunk; ++i) {  // m - n = i - (chunk - 1)
      const int64_t offset = i - (a_.chunk - 1), distance = offset < 0 ? -offset : offset;
      decay_[i] = distance <= a_.chunk && (offset <= 0 || !a_.causal) ? power_[distance] : 0.0f;
    }
  }

  float power(int64_t i) const { return power_[i]; }

  // scores = (left right^T) times the decay between rows (of left) and columns;
  // turned holds right^T.
  template <class Hook>
  void score(Block left, Block right, float* turned, float* scores, int64_t n, Hook& hook) const {
    transpose(right.data, right.ld, turned, ldc, n, right.width);
    gemm<false>({left.data, left.ld, 1}, turned, ldc, scores, ldc, n, n, left.width, hook);
    for (int64_t i = 0; i < n; ++i) {
      float* row = scores + i * ldc;
      const float* decay = decay_ + (a_.chunk - 1 - i);
      for (int64_t j = 0; j < n; j += kLanes) store(row + j, load(row + j) * load(decay + j));
    }
  }

  // out = weight(i) x, row by row
  template <class Weight>
  static void scale(Block x, float* out, int64_t n, const Weight& weight) {
    for (int64_t i = 0; i < n; ++i) {
      const Vec w = set1(weight(i));
      for (int64_t j = 0; j < x.ld; j += kLanes) store(out + i * x.ld + j, w * load(x.row(i) + j));
    }
  }

  // to (left.width, right.ld) = decay^n from + (scaled rows of left)^T right;
  // from may be null, for zero.
  template <class Hook>
  void pass_on(const float* from, float* to, const float* scaled, Block left, Block right, int64_t n,
               Hook& hook) const {
    const Matrix columns = {scaled, 1, left.ld};
    if (from == nullptr)
      return gemm<false>(columns, right.data, right.ld, to, right.ld, left.width, right.width, n, hook);
    const Vec carry = set1(power_[n]);
    for (int64_t i = 0; i < left.width * right.ld; i += kLanes) store(to + i, carry * load(from + i));
    gemm<true>(columns, right.data, right.ld, to, right.ld, left.width, right.width, n, hook);
  }

  // n rows of x from token first on; columns beyond the width are 0.
  void read(const void* x, Block out, int64_t first, int64_t n, int64_t head) const {
    const T* from = at(x, out.width, first, head);
    for (int64_t i = 0; i < n; ++i, from += a_.heads * out.width) {
      int64_t j = 0;
      for (; j + kLanes <= out.width; j += kLanes) store(out.row(i) + j, load(from + j));
      if (j < out.width) store(out.row(i) + j, load(from + j, out.width - j));
    }
  }

  void write(void* x, Block from, int64_t first, int64_t n, int64_t head) const {
    T* to = at(x, from.width, first, head);
    for (int64_t i = 0; i < n; ++i, to += a_.heads * from.width) {
      int64_t j = 0;
      for (; j + kLanes <= from.width; j += kLanes) store(to + j, load(from.row(i) + j));
      if (j < from.width) store(to + j, load(from.row(i) + j), from.width - j);
    }
  }

  void clear(void* x, int64_t width, int64_t first, int64_t n, int64_t head) const {
    if (width == 0) return;
    T* to = at(x, width, first, head);
    for (int64_t i = 0; i < n; ++i, to += a_.heads * width) __builtin_memset(to, 0, width * sizeof(T));
  }

  void prefetch(Prefetch& prefetch, const void* x, int64_t width, int64_t first, int64_t head) const {
    prefetch.add(at(x, width, first, head), width * sizeof(T), a_.heads * width * sizeof(T));
  }

 private:
  const T* at(const void* x, int64_t width, int64_t token, int64_t head) const {
    return static_cast<const T*>(x) + (token * a_.heads + head) * width;
  }
  T* at(void* x, int64_t width, int64_t token, int64_t head) const {
    return static_cast<T*>(x) + (token * a_.heads + head) * width;
  }

  const Retention& a_;

 public:
  const int64_t ldk, ldv, ldc,
      rows;  // leading dimensions of keys, values and scores; rows of a buffer
  const int64_t state_floats,
      turned_floats;  // of a state (key, value), and of its transpose

 private:
  float *power_, *decay_;
};

}  // namespace uz::UZ_ISA

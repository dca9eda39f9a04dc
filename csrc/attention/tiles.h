// What both passes of attention share: the tile of scores, documents, and rows of one head in fp32.
#pragma once

#include "attention/kernels.h"
#include "common/gemm.h"

namespace uz::UZ_ISA {

inline constexpr int64_t kQueries = 48;  // of a tile of scores: a multiple of kTileRows and of kDrawn
inline constexpr int64_t kKeys = 256;    // at most
inline constexpr int64_t kDrawn = 8;     // queries that one Philox block decides on
inline constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Rows of at most ld numbers in fp32; there is memory for whole groups of kDrawn rows.
struct Block {
  float* data;
  int64_t width, ld;
  float* row(int64_t i) const { return data + i * ld; }
};

inline Block take_block(Arena& arena, int64_t rows, int64_t width) {
  const int64_t ld = round_up(width, kLanes);
  return {arena.take(round_up(rows, kDrawn) * ld), width, ld};
}

// One row and head: where its tokens are.
class Place {
 public:
  Place(const Attention& a, int64_t item) : a_(a), batch_(item / a.heads), head_(item % a.heads) {}

  // document(first token, length) and padding(first token, length) along the row.
  template <class Document, class Padding>
  void walk(const Document& document, const Padding& padding) const {
    if (a_.length == 0) return;
    if (a_.segments == nullptr) return document(0, a_.length);
    const int64_t* segments = a_.segments + batch_ * a_.length;
    for (int64_t start = 0; start < a_.length;) {
      int64_t stop = start + 1;
      while (stop < a_.length && segments[stop] == segments[start]) ++stop;
      if (segments[start] == 0) {
        padding(start, stop - start);
      } else {
        document(start, stop - start);
      }
      start = stop;
    }
  }

  // n rows of x from `first` on, times the factor; columns beyond the width are 0.
  void read(const HeadRows& x, int64_t first, int64_t n, float* out, int64_t ld, float factor = 1.0f) const {
    visit(a_.dtype, [&]<class T>(T) {
      const T* from = static_cast<const T*>(x.data) + batch_ * x.batch + first * x.token + head_ * x.head;
      const Vec times = set1(factor);
      for (int64_t i = 0; i < n; ++i, from += x.token, out += ld)
        for_vectors(0, x.width, [&](int64_t j, auto... left) { store(out + j, load(from + j, left...) * times); });
    });
  }

  // The keys, or values, of a document: those of the prefix, then its own.
  void read_keys(const HeadRows& x, int64_t first, int64_t n, const Block& out) const {
    read(x, 0, a_.prefix, out.data, out.ld);
    read(x, a_.prefix + first, n, out.row(a_.prefix), out.ld);
  }

  // n rows times the factor into x (batch, rows, heads, width).
  void write(void* x, int64_t rows, const float* from, int64_t ld, int64_t width, int64_t first, int64_t n,
             float factor) const {
    visit(a_.dtype, [&]<class T>(T) {
      T* to = static_cast<T*>(x) + ((batch_ * rows + first) * a_.heads + head_) * width;
      const Vec times = set1(factor);
      for (int64_t i = 0; i < n; ++i, to += a_.heads * width, from += ld)
        for_vectors(0, width, [&](int64_t j, auto... left) { store(to + j, load(from + j) * times, left...); });
    });
  }

  void clear(void* x, int64_t rows, int64_t width, int64_t first, int64_t n) const {
    if (width == 0) return;
    const int64_t bytes = width * (a_.dtype == DType::fp32 ? 4 : 2);
    char* to = static_cast<char*>(x) + ((batch_ * rows + first) * a_.heads + head_) * bytes;
    for (int64_t i = 0; i < n; ++i, to += a_.heads * bytes) __builtin_memset(to, 0, static_cast<size_t>(bytes));
  }

  float* lse(int64_t first) const { return a_.lse + (batch_ * a_.heads + head_) * a_.length + first; }

 private:
  const Attention& a_;
  int64_t batch_, head_;
};

// out (rows.width, ld) = the first n rows, transposed; columns from n to ld are 0.
inline void turn(const Block& rows, int64_t n, float* out, int64_t ld) {
  transpose(rows.data, rows.ld, out, ld, n, rows.width);
  for (int64_t i = 0; i < rows.width; ++i)
    for (int64_t j = n; j < ld; ++j) out[i * ld + j] = 0.0f;
}

// 1 in the first n lanes, else 0.
inline Vec first_lanes(int64_t n) {
  alignas(64) static constexpr float kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  return load(kOnes, n);
}

}  // namespace uz::UZ_ISA

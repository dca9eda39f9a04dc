// What both passes share: the tokens of a document in the order of a sweep, 16 at a time, in fp32; and the products of
// their gates. A weight is only ever a product of gates, each at most 1: nothing overflows, nothing is divided, and
// what underflows is a weight too small to count.
#pragma once

#include "common/gemm.h"
#include "gated_linear_attention/kernels.h"

namespace uz::UZ_ISA {

inline constexpr int64_t kChunk = 16;

// Rows of `width` numbers, ld floats apart; ld is a multiple of kLanes, and the numbers up to it are 0.
struct Rows {
  float* data;
  int64_t width, ld;
  float* row(int64_t i) const { return data + i * ld; }
};

inline Rows take_rows(Arena& arena, int64_t rows, int64_t width) {
  const int64_t ld = round_up(width, kLanes);
  return {arena.take(rows * ld), width, ld};
}

// A document as a sweep meets it: place i is token first + i * step of the batch.
struct Sweep {
  int64_t first, step, length, direction;  // direction: 0 rightwards, 1 leftwards

  int64_t token(int64_t place) const { return first + place * step; }
  bool strict() const { return direction == 1; }  // a token reads itself in one direction only
};

// document(first token of the batch, length) and padding(first token, length) along a row.
template <class Document, class Padding>
void walk(const GatedAttention& a, int64_t row, const Document& document, const Padding& padding) {
  const int64_t first = row * a.length;
  if (a.segments == nullptr) return document(first, a.length);
  for (int64_t start = 0; start < a.length;) {
    const int64_t id = a.segments[first + start];
    int64_t stop = start + 1;
    while (stop < a.length && a.segments[first + stop] == id) ++stop;
    if (id == 0) {
      padding(first + start, stop - start);
    } else {
      document(first + start, stop - start);
    }
    start = stop;
  }
}

inline Sweep rightwards(int64_t first, int64_t length) { return {first, 1, length, 0}; }
inline Sweep leftwards(int64_t first, int64_t length) { return {first + length - 1, -1, length, 1}; }

inline int64_t chunks_of(int64_t length) { return (length + kChunk - 1) / kChunk; }

template <class T>
T* at(const GatedAttention& a, T* x, int64_t width, int64_t token, int64_t head) {
  return x + (token * a.heads + head) * width;
}

template <class T>
void read(const GatedAttention& a, const void* x, Rows out, const Sweep& s, int64_t place, int64_t n, int64_t head) {
  for (int64_t i = 0; i < n; ++i) {
    const T* from = at(a, static_cast<const T*>(x), out.width, s.token(place + i), head);
    for_vectors(0, out.width, [&](int64_t j, auto... tail) { store(out.row(i) + j, load(from + j, tail...)); });
  }
}

template <class T>
void write(const GatedAttention& a, void* x, Rows rows, const Sweep& s, int64_t place, int64_t n, int64_t head) {
  for (int64_t i = 0; i < n; ++i) {
    T* to = at(a, static_cast<T*>(x), rows.width, s.token(place + i), head);
    for_vectors(0, rows.width, [&](int64_t j, auto... tail) { store(to + j, load(rows.row(i) + j), tail...); });
  }
}

template <class T>
void clear(const GatedAttention& a, void* x, int64_t width, int64_t first, int64_t n, int64_t head) {
  if (width == 0) return;
  for (int64_t i = 0; i < n; ++i)
    __builtin_memset(at(a, static_cast<T*>(x), width, first + i, head), 0, width * sizeof(T));
}

// to += rows, or to = rows; places of a sweep against rows by token, which start at token `origin`.
template <bool kAdd>
void keep(Rows rows, Rows to, const Sweep& s, int64_t place, int64_t n, int64_t origin) {
  for (int64_t i = 0; i < n; ++i) {
    float *x = rows.row(i), *y = to.row(s.token(place + i) - origin);
    for (int64_t j = 0; j < rows.ld; j += kLanes) {
      if constexpr (kAdd) {
        store(x + j, load(x + j) + load(y + j));
      } else {
        store(y + j, load(x + j));
      }
    }
  }
}

// The gates of a chunk, and their products.
class Gates {
 public:
  Gates(const GatedAttention& a, Arena& arena)
      : a_(a),
        gate_(take_rows(arena, kChunk, a.key)),
        entering_(take_rows(arena, kChunk, a.key)),
        leaving_(take_rows(arena, kChunk, a.key)) {}

  // Products that leave the chunk are exponentials of sums: over many chunks the rounding of products would add up.
  void read(const Sweep& s, int64_t place, int64_t n, int64_t head) const {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t token = s.token(place + i) * a_.directions + s.direction;
      const float* from = at(a_, a_.log_gate, a_.key, token, head);
      for_vectors(0, a_.key, [&](int64_t j, auto... tail) { store(gate_.row(i) + j, load(from + j, tail...)); });
    }
    for (int64_t j = 0; j < gate_.ld; j += kLanes) {
      Vec sum = set1(0.0f);
      for (int64_t i = n - 1; i >= 0; --i) {
        store(leaving_.row(i) + j, exp(sum));
        sum = sum + load(gate_.row(i) + j);
      }
      sum = set1(0.0f);
      for (int64_t i = 0; i < n; ++i) {
        const Vec log_gate = load(gate_.row(i) + j);
        sum = sum + log_gate;
        store(entering_.row(i) + j, exp(sum));
        store(gate_.row(i) + j, exp(log_gate));
      }
    }
  }

  const float* gate(int64_t i) const { return gate_.row(i); }
  const float* entering(int64_t i) const { return entering_.row(i); }  // from before the chunk to place i
  const float* leaving(int64_t i) const { return leaving_.row(i); }    // from place i to the chunk's last

  // out = x times the products from before the chunk.
  void enter(Rows x, float* out, int64_t n) const { scale(x, entering_, out, n); }
  // out = x times the products up to the chunk's end.
  void leave(Rows x, float* out, int64_t n) const { scale(x, leaving_, out, n); }

 private:
  static void scale(Rows x, Rows by, float* out, int64_t n) {
    for (int64_t i = 0; i < n * x.ld; i += kLanes) store(out + i, load(x.data + i) * load(by.data + i));
  }

  const GatedAttention& a_;
  Rows gate_, entering_, leaving_;
};

// What place n of a chunk does with one earlier place m: the dot product of q_n and the decayed k_m, and kSums: the sum
// of pair(n, m) times the decayed k_m, to sums.
template <int kPlaces, bool kSums>
inline void meet(const float* gate, const float* q, float* decayed, int64_t ld, float* scores, const float* pairs,
                 float* sums) {
  Vec dot[kPlaces];
#pragma GCC unroll 4
  for (int m = 0; m < kPlaces; ++m) dot[m] = set1(0.0f);
  for (int64_t j = 0; j < ld; j += kLanes) {
    const Vec g = load(gate + j), x = load(q + j);
    Vec sum = set1(0.0f);
    if constexpr (kSums) sum = load(sums + j);
#pragma GCC unroll 4
    for (int m = 0; m < kPlaces; ++m) {
      float* key = decayed + m * ld + j;
      const Vec d = load(key) * g;
      store(key, d);
      dot[m] = fma(d, x, dot[m]);
      if constexpr (kSums) sum = fma(set1(pairs[m]), d, sum);
    }
    if constexpr (kSums) store(sums + j, sum);
  }
#pragma GCC unroll 4
  for (int m = 0; m < kPlaces; ++m) scores[m] = reduce_add(dot[m]);
}

// scores (kChunk x kChunk) = sum_j q_nj k_mj w_nmj for m < n, and m = n unless strict; 0 elsewhere. k is
// overwritten.
// With kSums: sums_n = sum_m pairs_nm k_m w_nm, pairs being 0 where scores are.
template <bool kSums>
void score(const Gates& gates, Rows q, Rows k, float* scores, int64_t n, bool strict, const float* pairs, Rows sums) {
  for (int64_t i = 0; i < n; ++i) {
    float* row = scores + i * kChunk;
    const float *p = pairs + i * kChunk, *x = q.row(i);
    float* sum = kSums ? sums.row(i) : nullptr;
    Vec own = set1(0.0f);
    for (int64_t j = 0; j < q.ld; j += kLanes) {
      const Vec key = load(k.row(i) + j);
      own = fma(load(x + j), key, own);
      if constexpr (kSums) store(sum + j, set1(p[i]) * key);
    }
    int64_t m = 0;
    for (; m + 4 <= i; m += 4) meet<4, kSums>(gates.gate(i), x, k.row(m), k.ld, row + m, p + m, sum);
    for (; m < i; ++m) meet<1, kSums>(gates.gate(i), x, k.row(m), k.ld, row + m, p + m, sum);
    row[m] = strict ? 0.0f : reduce_add(own);
    for (++m; m < kChunk; ++m) row[m] = 0.0f;
  }
}

}  // namespace uz::UZ_ISA

// From scores to weights, in place, for a tile of queries x keys: the exponentials, the dropout and their gradients.
#pragma once

#include "attention/tiles.h"
#include "common/exp2.h"
#include "common/philox.h"

namespace uz::UZ_ISA {

// A tile of scores: rows are queries, columns keys. Scores come as powers of two, 2^(row + score) being e^(the score).
struct Tile {
  float* data;
  int64_t ld, queries, keys;
};

// Which pairs dropout keeps: 16 bits of slot (query % kDrawn), in its document, of the block (key, first query of that
// group in the row, row * heads + head, 1); keys are counted in the document, those of the prefix first.
struct Dropping {
  Philox random;
  Keep keep;
  uint32_t item = 0, first_query = 0, first_key = 0;

  Dropping(uint64_t seed, int64_t of_65536) : random(seed), keep(of_65536) {}

  Draws draws(int64_t query, int64_t key) const {
    return random(first_key + static_cast<uint32_t>(key), first_query + static_cast<uint32_t>(query), item, 1);
  }
};

inline Vec exp2_of(Vec x) { return exp2(max(set1(-150.0f), x)); }  // -inf too, which exp2 does not take

// Calls body(j, real) for the vectors of columns, `real` the weights' own in a whole one, and 0 beyond the last key.
template <class Body>
inline void for_columns(int64_t keys, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes <= keys; j += kLanes) body(j, [](Vec x) { return x; });
  if (j < keys) {
    const Vec inside = first_lanes(keys - j);
    body(j, [&](Vec x) { return select_gt(inside, set1(0.5f), x, set1(0.0f)); });
  }
}

inline float row_max(const float* row, int64_t keys) {
  Vec top = set1(-__builtin_inff());
  int64_t j = 0;
  for (; j + kLanes <= keys; j += kLanes) top = max(top, load(row + j));
  if (j < keys) top = max(top, select_gt(first_lanes(keys - j), set1(0.5f), load(row + j), set1(-__builtin_inff())));
  return reduce_max(top);
}

// w = 2^(score - shift), what is kept of it in place of the score, and the sum of all w of a row in sums.
template <bool kDrop>
void softmax_weights(const Tile& t, const Dropping& drop, const float* shift, float* sums) {
  for (int64_t i = 0; i < t.queries; i += kDrawn) {
    float* rows = t.data + i * t.ld;
    Vec sum[kDrawn];
#pragma GCC unroll 8
    for (int r = 0; r < kDrawn; ++r) sum[r] = set1(0.0f);
    for_columns(t.keys, [&](int64_t j, auto real) {
      Draws draws;
      if constexpr (kDrop) draws = drop.draws(i, j);
#pragma GCC unroll 8
      for (int r = 0; r < kDrawn; ++r) {
        float* at = rows + r * t.ld + j;
        const Vec w = real(exp2_of(load(at) - set1(shift[i + r])));
        sum[r] = sum[r] + w;
        store(at, kDrop ? drop.keep(draws, r, w) : w);
      }
    });
#pragma GCC unroll 8
    for (int r = 0; r < kDrawn; ++r) sums[i + r] = reduce_add(sum[r]);
  }
}

// w = 1 / (1 + 2^(score + shift)), what is kept of it in place of the score.
template <bool kDrop>
void sigmoid_weights(const Tile& t, const Dropping& drop, float shift) {
  const Vec one = set1(1.0f), shifts = set1(shift);
  for (int64_t i = 0; i < t.queries; i += kDrawn) {
    float* rows = t.data + i * t.ld;
    for (int64_t j = 0; j < t.keys; j += kLanes) {
      Draws draws;
      if constexpr (kDrop) draws = drop.draws(i, j);
#pragma GCC unroll 8
      for (int r = 0; r < kDrawn; ++r) {
        float* at = rows + r * t.ld + j;
        const Vec w = one / (one + exp2_of(load(at) + shifts));
        store(at, kDrop ? drop.keep(draws, r, w) : w);
      }
    }
  }
}

// The scores become the weights w that are kept; p, of the same layout, goes from grad . v to the gradient of the
// scores: w (kept p - delta), and w (1 - w) kept p for the sigmoid. shift as above, per row or, for the sigmoid, one.
template <bool kDrop, bool kSigmoid>
void weight_gradients(const Tile& t, float* p, const Dropping& drop, const float* shift, const float* delta) {
  const Vec one = set1(1.0f);
  for (int64_t i = 0; i < t.queries; i += kDrawn) {
    for (int64_t j = 0; j < t.keys; j += kLanes) {
      Draws draws;
      if constexpr (kDrop) draws = drop.draws(i, j);
#pragma GCC unroll 8
      for (int r = 0; r < kDrawn; ++r) {
        const int64_t at = (i + r) * t.ld + j;
        const Vec score = load(t.data + at), g = kDrop ? drop.keep(draws, r, load(p + at)) : load(p + at);
        Vec w;
        if constexpr (kSigmoid) {
          w = one / (one + exp2_of(score + set1(*shift)));
          store(p + at, (w - w * w) * g);
        } else {
          w = exp2_of(score - set1(shift[i + r]));
          store(p + at, w * (g - set1(delta[i + r])));
        }
        store(t.data + at, kDrop ? drop.keep(draws, r, w) : w);
      }
    }
  }
}

}  // namespace uz::UZ_ISA

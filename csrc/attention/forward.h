// The forward of one row and head. Its document's keys, transposed, and values stay in cache; a tile of queries goes
// through them kKeys at a time, with the running maximum and sum of each row.
#pragma once

#include <cmath>

#include "attention/weights.h"

namespace uz::UZ_ISA {

class AttentionForward {
 public:
  AttentionForward(const Attention& a, Arena& arena)
      : a_(a),
        ldm_(round_up(a.prefix + a.length, kLanes)),
        keys_(take_block(arena, a.prefix + a.length, a.k.width)),
        values_(take_block(arena, a.prefix + a.length, a.v.width)),
        turned_(arena.take(round_up(a.k.width, 4) * ldm_)),
        q_(take_block(arena, kQueries, a.q.width)),
        o_(take_block(arena, kQueries, a.v.width)),
        scores_(take_block(arena, kQueries, ldm_ < kKeys ? ldm_ : kKeys)),
        top_(arena.take(kQueries)),
        sum_(arena.take(kQueries)),
        part_(arena.take(kQueries)),
        drop_(a.seed, a.keep) {}

  void run(int64_t item) {
    const Place place(a_, item);
    drop_.item = static_cast<uint32_t>(item);
    place.walk([&](int64_t first, int64_t n) { document(place, first, n); },
               [&](int64_t first, int64_t n) {
                 place.clear(a_.o, a_.length, a_.v.width, first, n);
                 if (!a_.sigmoid) __builtin_memset(place.lse(first), 0, static_cast<size_t>(n) * sizeof(float));
               });
  }

 private:
  void document(const Place& place, int64_t first, int64_t n) {
    const int64_t keys = a_.prefix + n;
    place.read_keys(a_.k, first, n, keys_);
    place.read_keys(a_.v, first, n, values_);
    turn(keys_, keys, turned_, ldm_);
    const float log2_keys = static_cast<float>(std::log2(static_cast<double>(keys)));
    for (int64_t i = 0; i < n; i += kQueries) {
      const int64_t queries = n - i < kQueries ? n - i : kQueries;
      drop_.first_query = static_cast<uint32_t>(first + i);
      place.read(a_.q, first + i, queries, q_.data, q_.ld,
                 static_cast<float>((a_.sigmoid ? -kLog2e : kLog2e) * double(a_.scale)));
      if (a_.sigmoid) {
        sigmoid(queries, keys, log2_keys);
      } else {
        softmax(queries, keys);
        float* lse = place.lse(first + i);
        for (int64_t r = 0; r < queries; ++r) lse[r] = static_cast<float>(top_[r] + std::log2(double(sum_[r])));
      }
      place.write(a_.o, a_.length, o_.data, o_.ld, a_.v.width, first + i, queries,
                  65536.0f / static_cast<float>(a_.keep));
    }
  }

  Tile score(int64_t queries, int64_t key, int64_t keys) {
    const int64_t count = keys - key < kKeys ? keys - key : kKeys;
    drop_.first_key = static_cast<uint32_t>(key);
    gemm<false>({q_.data, q_.ld, 1}, turned_ + key, ldm_, scores_.data, scores_.ld, queries, count, a_.q.width,
                Nothing{});
    return {scores_.data, scores_.ld, queries, count};
  }

  template <bool kAdd>
  void add_values(const Tile& t, int64_t key) {
    gemm<kAdd>({t.data, t.ld, 1}, values_.row(key), values_.ld, o_.data, o_.ld, t.queries, a_.v.width, t.keys,
               Nothing{});
  }

  bool drops() const { return a_.keep < 65536; }

  void sigmoid(int64_t queries, int64_t keys, float log2_keys) {
    for (int64_t key = 0; key < keys; key += kKeys) {
      const Tile t = score(queries, key, keys);
      drops() ? sigmoid_weights<true>(t, drop_, log2_keys) : sigmoid_weights<false>(t, drop_, log2_keys);
      key == 0 ? add_values<false>(t, key) : add_values<true>(t, key);
    }
  }

  void softmax(int64_t queries, int64_t keys) {
    for (int64_t key = 0; key < keys; key += kKeys) {
      const Tile t = score(queries, key, keys);
      for (int64_t r = 0; r < queries; ++r) {
        const float top = row_max(t.data + r * t.ld, t.keys);
        if (key == 0) {
          top_[r] = top;
        } else if (!(top <= top_[r])) {
          const Vec factor = exp2_of(set1(top_[r] - top));
          for (int64_t j = 0; j < o_.ld; j += kLanes) store(o_.row(r) + j, load(o_.row(r) + j) * factor);
          sum_[r] *= reduce_max(factor);
          top_[r] = top;
        }
      }
      drops() ? softmax_weights<true>(t, drop_, top_, part_) : softmax_weights<false>(t, drop_, top_, part_);
      for (int64_t r = 0; r < queries; ++r) sum_[r] = key == 0 ? part_[r] : sum_[r] + part_[r];
      key == 0 ? add_values<false>(t, key) : add_values<true>(t, key);
    }
    for (int64_t r = 0; r < queries; ++r) {
      const Vec share = set1(1.0f / sum_[r]);
      for (int64_t j = 0; j < o_.ld; j += kLanes) store(o_.row(r) + j, load(o_.row(r) + j) * share);
    }
  }

  const Attention& a_;
  const int64_t ldm_;
  Block keys_, values_;
  float* turned_;
  Block q_, o_, scores_;
  float *top_, *sum_, *part_;
  Dropping drop_;
};

}  // namespace uz::UZ_ISA

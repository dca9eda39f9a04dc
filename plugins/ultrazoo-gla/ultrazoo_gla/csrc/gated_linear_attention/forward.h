// The forward of one row and head: a sweep leftwards, kept, then one rightwards that adds it and writes each output
// once.
#pragma once

#include "gated_linear_attention/chunk.h"

namespace uz::UZ_ISA {

template <class T>
class GatedForward {
 public:
  GatedForward(const GatedAttention& a, Arena& arena)
      : a_(a),
        gates_(a, arena),
        q_(take_rows(arena, kChunk, a.key)),
        k_(take_rows(arena, kChunk, a.key)),
        scaled_(take_rows(arena, kChunk, a.key)),
        left_(take_rows(arena, kChunk, a.key)),
        v_(take_rows(arena, kChunk, a.value)),
        o_(take_rows(arena, kChunk, a.value)),
        scores_(arena.take(kChunk * kChunk)),
        state_(take_rows(arena, a.key, a.value)),
        kept_(take_rows(arena, a.directions == 2 ? a.length : 0, a.value)) {}

  void run(int64_t row, int64_t head) {
    head_ = head, origin_ = row * a_.length;
    walk(
        a_, row,
        [&](int64_t first, int64_t length) {
          if (a_.directions == 2) sweep(leftwards(first, length));
          sweep(rightwards(first, length));
        },
        [&](int64_t first, int64_t length) { clear<T>(a_, a_.o, a_.value, first, length, head_); });
  }

 private:
  void sweep(const Sweep& s) {
    for (int64_t place = 0; place < s.length; place += kChunk) {
      const int64_t n = s.length - place < kChunk ? s.length - place : kChunk;
      read<T>(a_, a_.q, q_, s, place, n, head_);
      read<T>(a_, a_.k, k_, s, place, n, head_);
      read<T>(a_, a_.v, v_, s, place, n, head_);
      gates_.read(s, place, n, head_);
      const bool last = place + n == s.length;
      if (!last) gates_.leave(k_, left_.data, n);
      score<false>(gates_, q_, k_, scores_, n, s.strict(), scores_, {});
      gemm<false>({scores_, kChunk, 1}, v_.data, v_.ld, o_.data, o_.ld, n, a_.value, n, Nothing{});
      if (place > 0) {
        gates_.enter(q_, scaled_.data, n);
        gemm<true>({scaled_.data, scaled_.ld, 1}, state_.data, state_.ld, o_.data, o_.ld, n, a_.value, a_.key,
                   Nothing{});
      }
      if (!last) pass_on(place > 0, n);
      if (s.strict()) {
        keep<false>(o_, kept_, s, place, n, origin_);
      } else {
        if (a_.directions == 2) keep<true>(o_, kept_, s, place, n, origin_);
        write<T>(a_, a_.o, o_, s, place, n, head_);
      }
    }
  }

  // state = gates state + (decayed keys)^T values
  void pass_on(bool carry, int64_t n) {
    const Matrix keys = {left_.data, 1, left_.ld};
    if (!carry) return gemm<false>(keys, v_.data, v_.ld, state_.data, state_.ld, a_.key, a_.value, n, Nothing{});
    const float* product = gates_.entering(n - 1);
    for (int64_t j = 0; j < a_.key; ++j) {
      const Vec gate = set1(product[j]);
      for (int64_t i = 0; i < state_.ld; i += kLanes) store(state_.row(j) + i, gate * load(state_.row(j) + i));
    }
    gemm<true>(keys, v_.data, v_.ld, state_.data, state_.ld, a_.key, a_.value, n, Nothing{});
  }

  const GatedAttention& a_;
  Gates gates_;
  Rows q_, k_, scaled_, left_, v_, o_;
  float* scores_;
  Rows state_, kept_;
  int64_t head_ = 0, origin_ = 0;
};

}  // namespace uz::UZ_ISA

// The forward of one row and head. A walk leftwards over k and v keeps the
// states that enter the chunks from the right; a walk rightwards does the rest
// and writes each output once.
#pragma once

#include "retention/chunks.h"

namespace uz::UZ_ISA {

template <class T>
class RetentionForward {
 public:
  RetentionForward(const Retention& a, Arena& arena)
      : a_(a),
        chunks_(a, arena),
        q_{arena.take(chunks_.rows * chunks_.ldk), a.key, chunks_.ldk},
        k_{arena.take(chunks_.rows * chunks_.ldk), a.key, chunks_.ldk},
        v_{arena.take(chunks_.rows * chunks_.ldv), a.value, chunks_.ldv},
        o_{arena.take(chunks_.rows * chunks_.ldv), a.value, chunks_.ldv},
        scaled_(arena.take(chunks_.rows * chunks_.ldk)),
        turned_(arena.take(chunks_.ldk * chunks_.ldc)),
        scores_(arena.take(chunks_.rows * chunks_.ldc)),
        state_(arena.take(chunks_.state_floats)),
        later_(arena.take(a.causal ? 0 : (a.length - 1) / a.chunk * chunks_.state_floats)) {}

  void run(int64_t row, int64_t head) {
    head_ = head;
    chunks_.set_decay(a_.log_decay[head]);
    chunks_.walk(
        row, [&](int64_t first, int64_t length) { document(first, length); },
        [&](int64_t first, int64_t length) { chunks_.clear(a_.o, a_.value, first, length, head_); });
  }

 private:
  void document(int64_t first, int64_t length) {
    const int64_t count = (length + a_.chunk - 1) / a_.chunk;
    if (!a_.causal) keep_later_states(first, length, count);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t start = first + c * a_.chunk, n = c + 1 < count ? a_.chunk : length - c * a_.chunk;
      const bool last = c + 1 == count;
      aim(read_ahead_, start + n, last ? 0 : (c + 2 < count ? a_.chunk : length - (c + 1) * a_.chunk));
      if (!last) chunks_.prefetch(read_ahead_, a_.q, a_.key, start + n, head_);
      chunks_.read(a_.q, q_, start, n, head_);
      chunks_.read(a_.k, k_, start, n, head_);
      chunks_.read(a_.v, v_, start, n, head_);
      chunks_.score(q_, k_, turned_, scores_, n, read_ahead_);
      gemm<false>({scores_, chunks_.ldc, 1}, v_.data, v_.ld, o_.data, o_.ld, n, a_.value, n, read_ahead_);
      if (c > 0) {
        chunks_.scale(q_, scaled_, n, [&](int64_t i) { return chunks_.power(i + 1); });
        add_state(state_, n);
      }
      if (!a_.causal && !last) {
        chunks_.scale(q_, scaled_, n, [&](int64_t i) { return chunks_.power(n - i); });
        add_state(later_state(c), n);
      }
      if (!last) {
        chunks_.scale(k_, scaled_, n, [&](int64_t i) { return chunks_.power(n - 1 - i); });
        chunks_.pass_on(c > 0 ? state_ : nullptr, state_, scaled_, k_, v_, n, read_ahead_);
      }
      chunks_.write(a_.o, o_, start, n, head_);
    }
  }

  void add_state(const float* state, int64_t n) {
    gemm<true>({scaled_, chunks_.ldk, 1}, state, chunks_.ldv, o_.data, o_.ld, n, a_.value, a_.key, read_ahead_);
  }

  // The sum over the tokens m after chunk c of decay^(m - end of c) k_m v_m^T.
  float* later_state(int64_t c) const { return later_ + c * chunks_.state_floats; }

  void keep_later_states(int64_t first, int64_t length, int64_t count) {
    for (int64_t c = count - 1; c > 0; --c) {
      const int64_t start = first + c * a_.chunk, n = c + 1 < count ? a_.chunk : length - c * a_.chunk;
      aim(read_far_ahead_, start - a_.chunk, a_.chunk);
      chunks_.read(a_.k, k_, start, n, head_);
      chunks_.read(a_.v, v_, start, n, head_);
      chunks_.scale(k_, scaled_, n, [&](int64_t i) { return chunks_.power(i); });
      chunks_.pass_on(c + 1 < count ? later_state(c) : nullptr, later_state(c - 1), scaled_, k_, v_, n,
                      read_far_ahead_);
    }
  }

  void aim(Prefetch& prefetch, int64_t token, int64_t n) const {
    prefetch.start(n);
    if (n == 0) return;
    chunks_.prefetch(prefetch, a_.k, a_.key, token, head_);
    chunks_.prefetch(prefetch, a_.v, a_.value, token, head_);
  }

  const Retention& a_;
  Chunks<T> chunks_;
  Block q_, k_, v_, o_;
  float *scaled_, *turned_, *scores_, *state_, *later_;
  Prefetch read_ahead_{1}, read_far_ahead_{4};
  int64_t head_ = 0;
};

}  // namespace uz::UZ_ISA

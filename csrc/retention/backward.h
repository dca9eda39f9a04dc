// The backward of one row and head. With s_nm = (q_n . k_m) and p_nm = (g_n .
// v_m), both times the decay: dq_n = sum_m p_nm k_m, dk_m = sum_n p_nm q_n,
// dv_m = sum_n s_nm g_n. Beyond the chunk dq reads the state of the keys, the
// decayed sum of v_m k_m^T, and dk and dv read that of the queries, the sum of
// q_n g_n^T: for causal retention only the first from the left and only the
// second from the right. Two walks, as in the forward.
#pragma once

#include "retention/chunks.h"

namespace uz::UZ_ISA {

template <class T>
class RetentionGradients {
 public:
  RetentionGradients(const RetentionBackward& b, Arena& arena)
      : b_(b),
        a_(b.forward),
        chunks_(a_, arena),
        q_(block(arena, a_.key)),
        k_(block(arena, a_.key)),
        v_(block(arena, a_.value)),
        g_(block(arena, a_.value)),
        dq_(block(arena, a_.key)),
        dk_(block(arena, a_.key)),
        dv_(block(arena, a_.value)),
        scaled_(arena.take(chunks_.rows * (chunks_.ldk > chunks_.ldv ? chunks_.ldk : chunks_.ldv))),
        turned_(arena.take((chunks_.ldk > chunks_.ldv ? chunks_.ldk : chunks_.ldv) * chunks_.ldc)),
        s_(arena.take(chunks_.rows * chunks_.ldc)),
        p_(arena.take(chunks_.rows * chunks_.ldc)),
        keys_(arena.take(chunks_.turned_floats)),
        queries_(arena.take(chunks_.state_floats)),
        queries_turned_(arena.take(chunks_.turned_floats)),
        later_keys_(arena.take(a_.causal ? 0 : borders() * chunks_.turned_floats)),
        later_queries_(arena.take(borders() * chunks_.state_floats)) {}

  void run(int64_t row, int64_t head) {
    head_ = head;
    chunks_.set_decay(a_.log_decay[head]);
    chunks_.walk(
        row, [&](int64_t first, int64_t length) { document(first, length); },
        [&](int64_t first, int64_t length) {
          chunks_.clear(b_.dq, a_.key, first, length, head_);
          chunks_.clear(b_.dk, a_.key, first, length, head_);
          chunks_.clear(b_.dv, a_.value, first, length, head_);
        });
  }

 private:
  Block block(Arena& arena, int64_t width) const {
    const int64_t ld = round_up(width, kLanes);
    return {arena.take(chunks_.rows * ld), width, ld};
  }

  int64_t borders() const { return (a_.length - 1) / a_.chunk; }
  float* later_keys(int64_t c) const { return later_keys_ + c * chunks_.turned_floats; }
  float* later_queries(int64_t c) const { return later_queries_ + c * chunks_.state_floats; }

  void document(int64_t first, int64_t length) {
    const int64_t count = (length + a_.chunk - 1) / a_.chunk;
    keep_later_states(first, length, count);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t start = first + c * a_.chunk, n = c + 1 < count ? a_.chunk : length - c * a_.chunk;
      const bool last = c + 1 == count;
      aim(read_ahead_, start + n, last ? 0 : (c + 2 < count ? a_.chunk : length - (c + 1) * a_.chunk));
      read(start, n);
      own_chunk(n);
      if (c > 0) {
        const auto entering = [&](int64_t i) { return chunks_.power(i + 1); };
        from_keys(keys_, n, entering);
        if (!a_.causal) from_queries(queries_, n, entering);
      }
      if (!last) {
        const auto entering = [&](int64_t i) { return chunks_.power(n - i); };
        if (!a_.causal) from_keys(later_keys(c), n, entering);
        from_queries(later_queries(c), n, entering);
        const auto leaving = [&](int64_t i) { return chunks_.power(n - 1 - i); };
        pass_on(c > 0 ? keys_ : nullptr, keys_, v_, k_, n, leaving, read_ahead_);
        if (!a_.causal) pass_on(c > 0 ? queries_ : nullptr, queries_, q_, g_, n, leaving, read_ahead_);
      }
      chunks_.write(b_.dq, dq_, start, n, head_);
      chunks_.write(b_.dk, dk_, start, n, head_);
      chunks_.write(b_.dv, dv_, start, n, head_);
    }
  }

  void keep_later_states(int64_t first, int64_t length, int64_t count) {
    for (int64_t c = count - 1; c > 0; --c) {
      const int64_t start = first + c * a_.chunk, n = c + 1 < count ? a_.chunk : length - c * a_.chunk;
      aim(read_far_ahead_, start - a_.chunk, a_.chunk);
      read(start, n);
      const bool first_one = c + 1 == count;
      const auto leaving = [&](int64_t i) { return chunks_.power(i); };
      if (!a_.causal)
        pass_on(first_one ? nullptr : later_keys(c), later_keys(c - 1), v_, k_, n, leaving, read_far_ahead_);
      pass_on(first_one ? nullptr : later_queries(c), later_queries(c - 1), q_, g_, n, leaving, read_far_ahead_);
    }
  }

  void read(int64_t start, int64_t n) const {
    chunks_.read(a_.q, q_, start, n, head_);
    chunks_.read(a_.k, k_, start, n, head_);
    chunks_.read(a_.v, v_, start, n, head_);
    chunks_.read(b_.grad, g_, start, n, head_);
  }

  void own_chunk(int64_t n) {
    const int64_t ldc = chunks_.ldc;
    chunks_.score(q_, k_, turned_, s_, n, read_ahead_);
    chunks_.score(g_, v_, turned_, p_, n, read_ahead_);
    gemm<false>({p_, ldc, 1}, k_.data, k_.ld, dq_.data, dq_.ld, n, a_.key, n, read_ahead_);
    gemm<false>({p_, 1, ldc}, q_.data, q_.ld, dk_.data, dk_.ld, n, a_.key, n, read_ahead_);
    gemm<false>({s_, 1, ldc}, g_.data, g_.ld, dv_.data, dv_.ld, n, a_.value, n, read_ahead_);
  }

  template <class Weight>
  void from_keys(const float* state, int64_t n, const Weight& weight) {
    chunks_.scale(g_, scaled_, n, weight);
    gemm<true>({scaled_, g_.ld, 1}, state, k_.ld, dq_.data, dq_.ld, n, a_.key, a_.value, read_ahead_);
  }

  template <class Weight>
  void from_queries(const float* state, int64_t n, const Weight& weight) {
    transpose(state, g_.ld, queries_turned_, q_.ld, a_.key, a_.value);
    chunks_.scale(v_, scaled_, n, weight);
    gemm<true>({scaled_, v_.ld, 1}, queries_turned_, q_.ld, dk_.data, dk_.ld, n, a_.key, a_.value, read_ahead_);
    chunks_.scale(k_, scaled_, n, weight);
    gemm<true>({scaled_, k_.ld, 1}, state, g_.ld, dv_.data, dv_.ld, n, a_.value, a_.key, read_ahead_);
  }

  template <class Weight>
  void pass_on(const float* from, float* to, Block left, Block right, int64_t n, const Weight& weight,
               Prefetch& prefetch) {
    chunks_.scale(left, scaled_, n, weight);
    chunks_.pass_on(from, to, scaled_, left, right, n, prefetch);
  }

  void aim(Prefetch& prefetch, int64_t token, int64_t n) const {
    prefetch.start(n);
    if (n == 0) return;
    chunks_.prefetch(prefetch, a_.q, a_.key, token, head_);
    chunks_.prefetch(prefetch, a_.k, a_.key, token, head_);
    chunks_.prefetch(prefetch, a_.v, a_.value, token, head_);
    chunks_.prefetch(prefetch, b_.grad, a_.value, token, head_);
  }

  const RetentionBackward& b_;
  const Retention& a_;
  Chunks<T> chunks_;
  Block q_, k_, v_, g_, dq_, dk_, dv_;
  float *scaled_, *turned_, *s_, *p_, *keys_, *queries_, *queries_turned_, *later_keys_, *later_queries_;
  Prefetch read_ahead_{1}, read_far_ahead_{2};
  int64_t head_ = 0;
};

}  // namespace uz::UZ_ISA

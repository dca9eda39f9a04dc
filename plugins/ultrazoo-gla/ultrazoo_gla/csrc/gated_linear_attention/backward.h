// The backward of one row and head, a sweep for each direction. With p_nm = grad_n . v_m and s_nm the score: dq_n =
// sum_m p_nm k_m w_nm, dk_m = sum_n p_nm q_n w_nm, dv_m = sum_n s_nm grad_n. A gate's logarithm takes part in every
// pair that it stands between: the sum over the places from its own to the end of the chunk of q dq - k dk (pairs on
// one side of it cancel), plus the pairs that reach beyond the chunk, state . gradient of the state.
// States are held transposed, (value, key).
#pragma once

#include "gated_linear_attention/chunk.h"

namespace uz::UZ_ISA {

template <class T>
class GatedGradients {
 public:
  GatedGradients(const GatedAttentionBackward& b, Arena& arena)
      : b_(b),
        a_(b.forward),
        gates_(a_, arena),
        q_(take_rows(arena, kChunk, a_.key)),
        k_(take_rows(arena, kChunk, a_.key)),
        scaled_(take_rows(arena, kChunk, a_.key)),
        left_(take_rows(arena, kChunk, a_.key)),
        dq_(take_rows(arena, kChunk, a_.key)),
        dk_(take_rows(arena, kChunk, a_.key)),
        v_(take_rows(arena, kChunk, a_.value)),
        g_(take_rows(arena, kChunk, a_.value)),
        dv_(take_rows(arena, kChunk, a_.value)),
        turned_v_(arena.take(round_up(a_.value, kLanes) * kChunk)),
        s_(arena.take(kChunk * kChunk)),
        p_(arena.take(kChunk * kChunk)),
        beyond_(take_rows(arena, 1, a_.key)),
        dstate_(take_rows(arena, round_up(a_.value, 4), a_.key)),
        turned_(take_rows(arena, round_up(a_.key, kLanes), a_.value)),
        states_(take_rows(arena, (chunks_of(a_.length) - 1) * a_.value, a_.key)),
        kept_q_(take_rows(arena, kept(), a_.key)),
        kept_k_(take_rows(arena, kept(), a_.key)),
        kept_v_(take_rows(arena, kept(), a_.value)) {}

  void run(int64_t row, int64_t head) {
    head_ = head, origin_ = row * a_.length;
    walk(
        a_, row,
        [&](int64_t first, int64_t length) {
          if (a_.directions == 2) sweep(leftwards(first, length));
          sweep(rightwards(first, length));
        },
        [&](int64_t first, int64_t length) {
          clear<T>(a_, b_.dq, a_.key, first, length, head_);
          clear<T>(a_, b_.dk, a_.key, first, length, head_);
          clear<T>(a_, b_.dv, a_.value, first, length, head_);
          for (int64_t i = 0; i < length; ++i)
            for (int64_t d = 0; d < a_.directions; ++d)
              clear<float>(a_, b_.dlog_gate, a_.key, (first + i) * a_.directions + d, 1, head_);
        });
  }

 private:
  int64_t kept() const { return a_.directions == 2 ? a_.length : 0; }
  // The state that enters chunk c > 0.
  float* state(int64_t c) const { return states_.row((c - 1) * a_.value); }

  void sweep(const Sweep& s) {
    const int64_t count = chunks_of(s.length);
    for (int64_t c = 0; c + 1 < count; ++c) keep_state(s, c);
    for (int64_t c = count - 1; c >= 0; --c) {
      const int64_t place = c * kChunk, n = c + 1 < count ? kChunk : s.length - place;
      const bool last = c + 1 == count;
      read<T>(a_, a_.q, q_, s, place, n, head_);
      read<T>(a_, a_.k, k_, s, place, n, head_);
      read<T>(a_, a_.v, v_, s, place, n, head_);
      read<T>(a_, b_.grad, g_, s, place, n, head_);
      gates_.read(s, place, n, head_);
      if (!last) gates_.leave(k_, left_.data, n);
      within(s.strict(), n);
      if (!last) from_later(n);
      if (c > 0) from_earlier(c, n);
      read<T>(a_, a_.k, k_, s, place, n, head_);
      gate_gradients(s, place, n, last ? nullptr : state(c + 1));
      if (c > 0) pass_back(last, n);
      finish(s, place, n);
    }
  }

  // The state that enters chunk c + 1, from the one that enters c.
  void keep_state(const Sweep& s, int64_t c) {
    const int64_t place = c * kChunk;
    read<T>(a_, a_.k, k_, s, place, kChunk, head_);
    read<T>(a_, a_.v, v_, s, place, kChunk, head_);
    gates_.read(s, place, kChunk, head_);
    gates_.leave(k_, scaled_.data, kChunk);
    carry(c > 0 ? state(c) : nullptr, state(c + 1), v_, scaled_.data, kChunk);
  }

  // to (value, key) = gates of the chunk times from, plus left^T right; from may be null, for zero.
  void carry(const float* from, float* to, Rows left, const float* right, int64_t n) {
    const Matrix columns = {left.data, 1, left.ld};
    const int64_t ld = dstate_.ld;
    if (from == nullptr) return gemm<false>(columns, right, ld, to, ld, a_.value, a_.key, n, Nothing{});
    const float* product = gates_.entering(n - 1);
    for (int64_t i = 0; i < a_.value; ++i)
      for (int64_t j = 0; j < ld; j += kLanes) store(to + i * ld + j, load(product + j) * load(from + i * ld + j));
    gemm<true>(columns, right, ld, to, ld, a_.value, a_.key, n, Nothing{});
  }

  void within(bool strict, int64_t n) {
    transpose(v_.data, v_.ld, turned_v_, kChunk, n, a_.value);
    gemm<false>({g_.data, g_.ld, 1}, turned_v_, kChunk, p_, kChunk, n, n, a_.value, Nothing{});
    for (int64_t i = 0; i < n; ++i)
      for (int64_t m = strict ? i : i + 1; m < kChunk; ++m) p_[i * kChunk + m] = 0.0f;
    score<true>(gates_, q_, k_, s_, n, strict, p_, dq_);
    gemm<false>({s_, 1, kChunk}, g_.data, g_.ld, dv_.data, dv_.ld, n, a_.value, n, Nothing{});
    key_gradients(n);
  }

  // dk_m = sum_n p_nm q_n w_nm, the queries decaying as m goes back.
  void key_gradients(int64_t n) {
    __builtin_memcpy(scaled_.data, q_.data, n * q_.ld * sizeof(float));
    for (int64_t j = 0; j < q_.ld; j += kLanes) {
      for (int64_t m = n - 1; m >= 0; --m) {
        Vec sum = set1(p_[m * kChunk + m]) * load(q_.row(m) + j);
        if (m + 1 < n) {
          const Vec gate = load(gates_.gate(m + 1) + j);
          for (int64_t i = m + 1; i < n; ++i) {
            const Vec x = gate * load(scaled_.row(i) + j);
            store(scaled_.row(i) + j, x);
            sum = fma(set1(p_[i * kChunk + m]), x, sum);
          }
        }
        store(dk_.row(m) + j, sum);
      }
    }
  }

  // dv += (keys decayed to the chunk's end) dstate, dk += gates (v dstate^T), read from what comes later in the sweep.
  void from_later(int64_t n) {
    transpose(dstate_.data, dstate_.ld, turned_.data, turned_.ld, a_.value, a_.key);
    gemm<true>({left_.data, left_.ld, 1}, turned_.data, turned_.ld, dv_.data, dv_.ld, n, a_.value, a_.key, Nothing{});
    gemm<false>({v_.data, v_.ld, 1}, dstate_.data, dstate_.ld, scaled_.data, scaled_.ld, n, a_.key, a_.value,
                Nothing{});
    for (int64_t i = 0; i < n; ++i) add_times(scaled_.row(i), gates_.leaving(i), dk_.row(i));
  }

  // dq += gates (grad state^T)
  void from_earlier(int64_t c, int64_t n) {
    gemm<false>({g_.data, g_.ld, 1}, state(c), dstate_.ld, scaled_.data, scaled_.ld, n, a_.key, a_.value, Nothing{});
    for (int64_t i = 0; i < n; ++i) add_times(scaled_.row(i), gates_.entering(i), dq_.row(i));
  }

  void add_times(const float* x, const float* y, float* to) const {
    for (int64_t j = 0; j < dq_.ld; j += kLanes) store(to + j, fma(load(x + j), load(y + j), load(to + j)));
  }

  void gate_gradients(const Sweep& s, int64_t place, int64_t n, const float* leaving) {
    for (int64_t j = 0; j < beyond_.ld; j += kLanes) {
      Vec sum = set1(0.0f);
      if (leaving != nullptr)
        for (int64_t i = 0; i < a_.value; ++i)
          sum = fma(load(leaving + i * dstate_.ld + j), load(dstate_.row(i) + j), sum);
      store(beyond_.data + j, sum);
    }
    for (int64_t i = n - 1; i >= 0; --i) {
      const int64_t token = s.token(place + i) * a_.directions + s.direction;
      float* to = at(a_, b_.dlog_gate, a_.key, token, head_);
      const bool is_first = place + i == 0;  // nothing enters a document
      for_vectors(0, a_.key, [&](int64_t j, auto... tail) {
        Vec sum = load(beyond_.data + j);
        sum = fma(load(q_.row(i) + j), load(dq_.row(i) + j), sum);
        sum = fnma(load(k_.row(i) + j), load(dk_.row(i) + j), sum);
        store(beyond_.data + j, sum);
        store(to + j, is_first ? set1(0.0f) : sum, tail...);
      });
    }
  }

  // The gradient of the state that enters this chunk.
  void pass_back(bool last, int64_t n) {
    gates_.enter(q_, scaled_.data, n);
    carry(last ? nullptr : dstate_.data, dstate_.data, g_, scaled_.data, n);
  }

  void finish(const Sweep& s, int64_t place, int64_t n) {
    if (s.strict()) {
      keep<false>(dq_, kept_q_, s, place, n, origin_);
      keep<false>(dk_, kept_k_, s, place, n, origin_);
      keep<false>(dv_, kept_v_, s, place, n, origin_);
      return;
    }
    if (a_.directions == 2) {
      keep<true>(dq_, kept_q_, s, place, n, origin_);
      keep<true>(dk_, kept_k_, s, place, n, origin_);
      keep<true>(dv_, kept_v_, s, place, n, origin_);
    }
    write<T>(a_, b_.dq, dq_, s, place, n, head_);
    write<T>(a_, b_.dk, dk_, s, place, n, head_);
    write<T>(a_, b_.dv, dv_, s, place, n, head_);
  }

  const GatedAttentionBackward& b_;
  const GatedAttention& a_;
  Gates gates_;
  Rows q_, k_, scaled_, left_, dq_, dk_, v_, g_, dv_;
  float *turned_v_, *s_, *p_;
  Rows beyond_, dstate_, turned_, states_, kept_q_, kept_k_, kept_v_;
  int64_t head_ = 0, origin_ = 0;
};

}  // namespace uz::UZ_ISA

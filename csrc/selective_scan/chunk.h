// Up to kScanChunk positions of one row, as both passes of the scan see them.
// Padding is left out: a chunk has as many steps as it has tokens, counted in
// the direction of the scan.
#pragma once

#include "common/arena.h"
#include "common/exp2.h"
#include "selective_scan/kernels.h"

namespace uz::UZ_ISA {

inline constexpr int64_t kChunk = kScanChunk;
inline constexpr int64_t kGroup = 128;  // channels per item, a multiple of every kLanes
inline constexpr double kLog2e = 1.4426950408889634;

template <class P>
inline Vec load_some(const P* p, int64_t left) {
  return left >= kLanes ? load(p) : load(p, left);
}
template <class P>
inline void store_some(P* p, Vec x, int64_t left) {
  if (left >= kLanes) return store(p, x);
  store(p, x, left);
}

inline Vec* take_vectors(Arena& arena, int64_t count) { return reinterpret_cast<Vec*>(arena.take(count * kLanes)); }

inline void clear(Vec* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = set1(0.0f);
}

// kStates states go through the steps together, in registers.
template <class T, int kStates>
class ScanChunk {
 public:
  ScanChunk(const SelectiveScan& a, Arena& arena)
      : a_(a),
        states(round_up(a.state, kStates)),
        B(arena.take(kChunk * states)),
        C(arena.take(kChunk * states)),
        dt(take_vectors(arena, kChunk)),
        dtu(take_vectors(arena, kChunk)),
        u(take_vectors(arena, kChunk)),
        sum(take_vectors(arena, kChunk)),
        A(take_vectors(arena, kGroup / kLanes * states)) {}

  int64_t count() const { return (a_.length + kChunk - 1) / kChunk; }
  int64_t steps() const { return steps_; }
  int64_t paddings() const { return paddings_; }

  // Where a step, or one of the paddings, stands in a (batch, length, width)
  // array.
  int64_t token(int64_t step) const { return row_ * a_.length + position_[step]; }
  int64_t padding_token(int64_t i) const { return row_ * a_.length + padding_[i]; }
  int64_t offset(int64_t step, int64_t channel) const { return token(step) * a_.dim + channel; }

  // The first step of a document in the direction of the scan, and its last.
  bool starts(int64_t step) const { return starts_[step]; }
  bool ends(int64_t step) const { return ends_[step]; }

  float* kept_state(int64_t n) const { return a_.states + ((row_ * count() + index_) * a_.state + n) * a_.dim; }

  // A log2(e) of some channels, (blocks, states, lanes); 0 in the states and
  // channels that are not there.
  void load_group(int64_t row, int64_t first_channel, int64_t channels) {
    row_ = row, first_channel_ = first_channel;
    float largest = 0.0f;
    for (int64_t block = 0; block * kLanes < channels; ++block) {
      for (int64_t n = 0; n < states; ++n) {
        float lanes[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          const int64_t channel = block * kLanes + i;
          const bool real = n < a_.state && channel < channels;
          lanes[i] = real ? static_cast<float>(a_.A[(first_channel + channel) * a_.state + n] * kLog2e) : 0.0f;
          const float size = lanes[i] < 0.0f ? -lanes[i] : lanes[i];
          if (size > largest) largest = size;
        }
        A[block * states + n] = load(lanes);
      }
    }
    longest_step_ = largest > 1e-30f ? 0x1p126f / largest : 0x1p126f;
  }

  // Arrays (batch, length, dim) whose next chunk is to be fetched into the
  // cache while this one is computed: the rows of a group of channels lie far
  // apart, where the hardware's own prefetching does not follow.
  void read_ahead(const void* x) {
    if (x != nullptr) ahead_[aheads_++] = reinterpret_cast<uintptr_t>(x);
  }

  // The steps of chunk `index`, counted by position, with their B and C; `next`
  // is the chunk that comes after it.
  void enter(int64_t index, int64_t next) {
    index_ = index, steps_ = 0, paddings_ = 0;
    to_next_ = next >= 0 && next < count() ? next - index : 0;
    const int64_t begin = index * kChunk, end = begin + kChunk < a_.length ? begin + kChunk : a_.length;
    for (int64_t i = 0; i < end - begin; ++i) {
      const int64_t position = a_.reverse ? end - 1 - i : begin + i;
      if (a_.segments != nullptr && segment(position) == 0) {
        padding_[paddings_++] = position;
        continue;
      }
      position_[steps_] = position;
      const int64_t ahead = a_.reverse ? -1 : 1;
      starts_[steps_] = border(position, -ahead);
      ends_[steps_] = border(position, ahead);
      widen(static_cast<const T*>(a_.B) + token(steps_) * a_.state, B + steps_ * states);
      widen(static_cast<const T*>(a_.C) + token(steps_) * a_.state, C + steps_ * states);
      ++steps_;
    }
  }

  Vec raw_delta(int64_t step, int64_t channel, int64_t left) const {
    const Vec x = load_some(static_cast<const T*>(a_.delta) + offset(step, channel), left);
    return a_.bias != nullptr ? x + load_some(a_.bias + channel, left) : x;
  }

  void load_inputs(int64_t channel, int64_t left) const {
    for (int64_t s = 0; s < steps_; ++s) {
      const Vec x = raw_delta(s, channel, left), step = a_.softplus ? softplus(x) : x;
      u[s] = load_some(static_cast<const T*>(a_.u) + offset(s, channel), left);
      dtu[s] = step * u[s];
      dt[s] = min(set1(longest_step_),
                  step);  // so that dt A is finite; at this size exp(dt A) is 0 anyway
    }
  }

  // kStates states of a block of channels, from n on, through the chunk: the states move on and <C, h> is added to sum;
  // exp(dt A) and exp(dt A) h are kept, if asked for, as (steps, states).
  template <bool kKeep>
  void advance(int64_t block, Vec* state, int64_t n, Vec* a_of, Vec* carried_of) const {
    const Vec *A_block = A + block * states + n, *dt_of = dt, *dtu_of = dtu;
    Vec* const sum_of = sum;
    const int64_t step_states = states;
    Vec h[kStates];
#pragma GCC unroll 16
    for (int i = 0; i < kStates; ++i) h[i] = state[i];
    for (int64_t s = 0; s < steps_; ++s) {
      if (starts_[s]) {
#pragma GCC unroll 16
        for (int i = 0; i < kStates; ++i) h[i] = set1(0.0f);
      }
      if (n == 0 && to_next_ != 0) prefetch(s, block);
      const Vec dt_s = dt_of[s], dtu_s = dtu_of[s];
      const int64_t at = s * step_states + n;
      const float *B_s = B + at, *C_s = C + at;
      Vec even = set1(0.0f), odd = set1(0.0f);
#pragma GCC unroll 16
      for (int i = 0; i < kStates; ++i) {
        const Vec a = exp2(dt_s * A_block[i]);
        const Vec carried = a * h[i];
        h[i] = fma(dtu_s, set1(B_s[i]), carried);
        if constexpr (kKeep) {
          a_of[at + i] = a;
          carried_of[at + i] = carried;
        }
        (i % 2 == 0 ? even : odd) = fma(h[i], set1(C_s[i]), i % 2 == 0 ? even : odd);
      }
      sum_of[s] = sum_of[s] + (even + odd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kStates; ++i) state[i] = h[i];
  }

 private:
  int64_t segment(int64_t position) const { return a_.segments[row_ * a_.length + position]; }
  // Whether the next token in a direction, padding not counted, is of another document.
  bool border(int64_t position, int64_t direction) const {
    if (a_.segments == nullptr) return false;
    int64_t other = position + direction;
    while (other >= 0 && other < a_.length && segment(other) == 0) other += direction;
    return other >= 0 && other < a_.length && segment(position) != segment(other);
  }

  // What the next chunk reads and writes at this step, and one row of its kept state. Inlined, for g++ drops calls of
  // functions that do nothing but prefetch.
  __attribute__((always_inline)) void prefetch(int64_t step, int64_t block) const {
    const int64_t channel = first_channel_ + block * kLanes, at = offset(step, channel) + to_next_ * kChunk * a_.dim;
    for (int i = 0; i < aheads_; ++i) __builtin_prefetch(reinterpret_cast<const void*>(ahead_[i] + at * sizeof(T)));
    if (step < a_.state) __builtin_prefetch(kept_state(step) + to_next_ * a_.state * a_.dim + channel);
  }

  void widen(const T* x, float* out) const {
    int64_t n = 0;
    for (; n + kLanes <= a_.state; n += kLanes) store(out + n, load(x + n));
    if (n < a_.state) store(out + n, load(x + n, a_.state - n), a_.state - n);
    for (n = a_.state; n < states; ++n) out[n] = 0.0f;
  }

  const SelectiveScan& a_;

 public:
  const int64_t states;  // a.state, rounded up to kStates
  float *B, *C;          // (steps, states)
  Vec *dt, *dtu, *u,
      *sum;  // one block of channels at each step: dt, dt u, u, <C, h>
  Vec* A;    // (blocks, states), times log2(e)

 private:
  int64_t row_ = 0, first_channel_ = 0, index_ = 0, steps_ = 0, paddings_ = 0, to_next_ = 0;
  uintptr_t ahead_[8] = {};
  int aheads_ = 0;
  float longest_step_ = 0.0f;
  int64_t position_[kChunk] = {}, padding_[kChunk] = {};
  bool starts_[kChunk] = {}, ends_[kChunk] = {};
};

}  // namespace uz::UZ_ISA

// The backward of one row and one group of channels, chunk by chunk against the
// scan: the states come anew from the kept one, then the adjoint g of the state
// goes back through them. The gradients of B and C are summed over the channels
// as vectors, and reduced over the lanes once per chunk.
#pragma once

#include "selective_scan/chunk.h"

namespace uz::UZ_ISA {

template <class T, int kStates>
class ScanGradients {
 public:
  ScanGradients(const SelectiveScanBackward& b, Arena& arena)
      : b_(b),
        a_(b.forward),
        chunk_(a_, arena),
        g_(take_vectors(arena, kGroup / kLanes * chunk_.states)),
        dA_(take_vectors(arena, kGroup / kLanes * chunk_.states)),
        dD_(take_vectors(arena, kGroup / kLanes)),
        dbias_(take_vectors(arena, kGroup / kLanes)),
        dB_(take_vectors(arena, kChunk * chunk_.states)),
        dC_(take_vectors(arena, kChunk * chunk_.states)),
        state_(take_vectors(arena, chunk_.states)),
        a_of_(take_vectors(arena, kChunk * chunk_.states)),
        carried_of_(take_vectors(arena, kChunk * chunk_.states)),
        dy_(take_vectors(arena, kChunk)),
        ddt_(take_vectors(arena, kChunk)),
        ddtu_(take_vectors(arena, kChunk)) {
    chunk_.read_ahead(a_.u), chunk_.read_ahead(a_.delta), chunk_.read_ahead(a_.z), chunk_.read_ahead(b.grad);
    chunk_.read_ahead(b.du), chunk_.read_ahead(b.ddelta), chunk_.read_ahead(b.dz);
  }

  void run(int64_t row, int64_t group, int64_t first_channel, int64_t channels) {
    chunk_.load_group(row, first_channel, channels);
    const int64_t states = chunk_.states, blocks = (channels + kLanes - 1) / kLanes, count = chunk_.count();
    clear(g_, blocks * states), clear(dA_, blocks * states), clear(dD_, blocks), clear(dbias_, blocks);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t index = a_.reverse ? i : count - 1 - i;
      chunk_.enter(index, a_.reverse ? index + 1 : index - 1);
      clear(dB_, chunk_.steps() * states), clear(dC_, chunk_.steps() * states);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t channel = first_channel + block * kLanes, left = channels - block * kLanes;
        recompute(block, channel, left);
        dD_[block] = dD_[block] + load_gradients(channel, left);
        for (int64_t n = 0; n < states; n += kStates) retreat(block, n);
        dbias_[block] = dbias_[block] + store_gradients(channel, left);
      }
      reduce(dB_, b_.dB, group * a_.batch * a_.length);
      reduce(dC_, b_.dC, group * a_.batch * a_.length);
    }
    store_parameters(row, first_channel, channels);
  }

 private:
  static constexpr int64_t kFew = 8;  // terms that are summed up before they are added to a longer sum: less is rounded

  void recompute(int64_t block, int64_t channel, int64_t left) const {
    for (int64_t n = 0; n < chunk_.states; ++n)
      state_[n] = n < a_.state ? load_some(chunk_.kept_state(n) + channel, left) : set1(0.0f);
    chunk_.load_inputs(channel, left);
    clear(chunk_.sum, chunk_.steps()), clear(ddt_, chunk_.steps()), clear(ddtu_, chunk_.steps());
    for (int64_t n = 0; n < chunk_.states; n += kStates)
      chunk_.template advance<true>(block, state_ + n, n, a_of_, carried_of_);
  }

  // The gradient of <C, h> into dy_, and that of z; returns what the chunk adds
  // to that of D.
  Vec load_gradients(int64_t channel, int64_t left) const {
    Vec dD[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
    const Vec D = a_.D != nullptr ? load_some(a_.D + channel, left) : set1(0.0f);
    for (int64_t s = 0; s < chunk_.steps(); ++s) {
      const int64_t at = chunk_.offset(s, channel);
      Vec dy = load_some(static_cast<const T*>(b_.grad) + at, left);
      if (a_.z != nullptr) {
        const Vec z = load_some(static_cast<const T*>(a_.z) + at, left), gate = sigmoid(z);
        const Vec slope = gate * fma(z, set1(1.0f) - gate, set1(1.0f));
        store_some(static_cast<T*>(b_.dz) + at, dy * fma(D, chunk_.u[s], chunk_.sum[s]) * slope, left);
        dy = dy * (z * gate);
      }
      dy_[s] = dy;
      dD[s % 4] = fma(dy, chunk_.u[s], dD[s % 4]);
    }
    return (dD[0] + dD[1]) + (dD[2] + dD[3]);
  }

  // kStates states of a block of channels, from n on, through the chunk: g moves back, its parts
  // go to dA, ddt_, ddtu_, dB_ and dC_.
  void retreat(int64_t block, int64_t n) const {
    const int64_t states = chunk_.states;
    const Vec* A = chunk_.A + block * states + n;
    Vec *adjoint = g_ + block * states + n, *dA_total = dA_ + block * states + n;
    Vec g[kStates], dA[kStates];
#pragma GCC unroll 16
    for (int i = 0; i < kStates; ++i) g[i] = adjoint[i], dA[i] = set1(0.0f);
    for (int64_t s = chunk_.steps() - 1; s >= 0; --s) {
      if (chunk_.ends(s)) {
#pragma GCC unroll 16
        for (int i = 0; i < kStates; ++i) g[i] = set1(0.0f);
      }
      const Vec dt = chunk_.dt[s], dtu = chunk_.dtu[s], dy = dy_[s];
      const int64_t at = s * states + n;
      const float *B = chunk_.B + at, *C = chunk_.C + at;
      Vec ddt[2] = {set1(0.0f), set1(0.0f)}, ddtu[2] = {set1(0.0f), set1(0.0f)};
#pragma GCC unroll 16
      for (int i = 0; i < kStates; ++i) {
        const Vec carried = carried_of_[at + i], h = fma(dtu, set1(B[i]), carried);
        g[i] = fma(dy, set1(C[i]), g[i]);
        dC_[at + i] = fma(dy, h, dC_[at + i]);
        dB_[at + i] = fma(g[i], dtu, dB_[at + i]);
        ddtu[i % 2] = fma(g[i], set1(B[i]), ddtu[i % 2]);
        const Vec through = g[i] * carried;  // the gradient of dt A
        ddt[i % 2] = fma(through, A[i], ddt[i % 2]);
        dA[i] = fma(through, dt, dA[i]);
        g[i] = g[i] * a_of_[at + i];
      }
      ddt_[s] = ddt_[s] + (ddt[0] + ddt[1]);
      ddtu_[s] = ddtu_[s] + (ddtu[0] + ddtu[1]);
      if (s % kFew == 0) {
#pragma GCC unroll 16
        for (int i = 0; i < kStates; ++i) dA_total[i] = dA_total[i] + dA[i], dA[i] = set1(0.0f);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kStates; ++i) adjoint[i] = g[i];
  }

  // The gradients of u and delta, 0 at padding; returns what the chunk adds to
  // that of the bias.
  Vec store_gradients(int64_t channel, int64_t left) const {
    T *du = static_cast<T*>(b_.du), *ddelta = static_cast<T*>(b_.ddelta);
    const Vec D = a_.D != nullptr ? load_some(a_.D + channel, left) : set1(0.0f);
    Vec dbias[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
    for (int64_t s = 0; s < chunk_.steps(); ++s) {
      const int64_t at = chunk_.offset(s, channel);
      Vec slope = fma(ddtu_[s], chunk_.u[s], ddt_[s] * set1(static_cast<float>(1 / kLog2e)));
      if (a_.softplus) slope = slope * sigmoid(chunk_.raw_delta(s, channel, left));
      store_some(du + at, fma(ddtu_[s], chunk_.dt[s], dy_[s] * D), left);
      store_some(ddelta + at, slope, left);
      dbias[s % 4] = dbias[s % 4] + slope;
    }
    for (int64_t i = 0; i < chunk_.paddings(); ++i) {
      const int64_t at = chunk_.padding_token(i) * a_.dim + channel;
      store_some(du + at, set1(0.0f), left);
      store_some(ddelta + at, set1(0.0f), left);
      if (a_.z != nullptr) store_some(static_cast<T*>(b_.dz) + at, set1(0.0f), left);
    }
    return (dbias[0] + dbias[1]) + (dbias[2] + dbias[3]);
  }

  void reduce(const Vec* x, float* out, int64_t first_token) const {
    for (int64_t s = 0; s < chunk_.steps(); ++s) {
      float* to = out + (first_token + chunk_.token(s)) * a_.state;
      for (int64_t n = 0; n < a_.state; ++n) to[n] = reduce_add(x[s * chunk_.states + n]);
    }
    for (int64_t i = 0; i < chunk_.paddings(); ++i) {
      float* to = out + (first_token + chunk_.padding_token(i)) * a_.state;
      for (int64_t n = 0; n < a_.state; ++n) to[n] = 0.0f;
    }
  }

  void store_parameters(int64_t row, int64_t first_channel, int64_t channels) const {
    for (int64_t block = 0; block * kLanes < channels; ++block) {
      const int64_t channel = row * a_.dim + first_channel + block * kLanes, left = channels - block * kLanes;
      store_some(b_.dD + channel, dD_[block], left);
      store_some(b_.dbias + channel, dbias_[block], left);
      for (int64_t n = 0; n < a_.state; ++n) {
        float lanes[kLanes];
        store(lanes, dA_[block * chunk_.states + n]);
        for (int64_t i = 0; i < kLanes && i < left; ++i) b_.dA[(channel + i) * a_.state + n] = lanes[i];
      }
    }
  }

  const SelectiveScanBackward& b_;
  const SelectiveScan& a_;
  ScanChunk<T, kStates> chunk_;
  Vec *g_, *dA_, *dD_, *dbias_;
  Vec *dB_, *dC_, *state_, *a_of_, *carried_of_;  // (steps, states) of one chunk, but for the state
  Vec *dy_, *ddt_, *ddtu_;                        // one block of channels at each step
};

}  // namespace uz::UZ_ISA

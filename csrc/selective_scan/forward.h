// The forward of one row and one group of channels.
#pragma once

#include "selective_scan/chunk.h"

namespace uz::UZ_ISA {

template <class T, int kStates>
class ScanForward {
 public:
  ScanForward(const SelectiveScan& a, Arena& arena)
      : a_(a), chunk_(a, arena), h_(take_vectors(arena, kGroup / kLanes * chunk_.states)) {
    chunk_.read_ahead(a.u), chunk_.read_ahead(a.delta), chunk_.read_ahead(a.z), chunk_.read_ahead(a.y);
  }

  void run(int64_t row, int64_t, int64_t first_channel, int64_t channels) {
    chunk_.load_group(row, first_channel, channels);
    const int64_t states = chunk_.states, blocks = (channels + kLanes - 1) / kLanes, count = chunk_.count();
    clear(h_, blocks * states);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t index = a_.reverse ? count - 1 - i : i;
      chunk_.enter(index, a_.reverse ? index - 1 : index + 1);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t channel = first_channel + block * kLanes, left = channels - block * kLanes;
        Vec* state = h_ + block * states;
        for (int64_t n = 0; n < a_.state; ++n) store_some(chunk_.kept_state(n) + channel, state[n], left);
        chunk_.load_inputs(channel, left);
        clear(chunk_.sum, chunk_.steps());
        for (int64_t n = 0; n < states; n += kStates)
          chunk_.template advance<false>(block, state + n, n, nullptr, nullptr);
        store_outputs(channel, left);
      }
    }
  }

 private:
  void store_outputs(int64_t channel, int64_t left) const {
    T* y = static_cast<T*>(a_.y);
    const Vec D = a_.D != nullptr ? load_some(a_.D + channel, left) : set1(0.0f);
    for (int64_t s = 0; s < chunk_.steps(); ++s) {
      const int64_t at = chunk_.offset(s, channel);
      Vec sum = chunk_.sum[s];
      if (a_.D != nullptr) sum = fma(D, chunk_.u[s], sum);
      if (a_.z != nullptr) {
        const Vec z = load_some(static_cast<const T*>(a_.z) + at, left);
        sum = sum * (z * sigmoid(z));
      }
      store_some(y + at, sum, left);
    }
    for (int64_t i = 0; i < chunk_.paddings(); ++i)
      store_some(y + chunk_.padding_token(i) * a_.dim + channel, set1(0.0f), left);
  }

  const SelectiveScan& a_;
  ScanChunk<T, kStates> chunk_;
  Vec* h_;
};

}  // namespace uz::UZ_ISA

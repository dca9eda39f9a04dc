// Selective scan. One vector holds kLanes channels, registers hold kStates of their states; time is cut into chunks of
// kChunk steps, so that what does not depend on the state (dt, dt u, B, C) is computed or converted once per chunk.
// Floor: arithmetic, not traffic: an exp (9 instructions here) and 4 multiply-adds per state, against 16 bytes per
// channel and step. The backward keeps the state at chunk starts only, recomputes the rest chunk by chunk, and sums
// the gradients of B and C over channels as vectors, to be reduced over the lanes once per chunk and group of channels.
#include <cstdlib>
#include <memory>

#include "common/simd.h"
#include "selective_scan/kernels.h"

namespace uz::UZ_ISA {
namespace {

constexpr int64_t kChunk = kScanChunk;
constexpr int64_t kGroup = 128;  // channels per item
constexpr int kMaxStates = UZ_ISA_LEVEL >= 2 ? 16 : 8;

// 2^x for x <= 127, within 1 ulp; 0 below -150.
inline Vec exp2(Vec x) {
  x = max(set1(-150.0f), x);
  const Vec n = round(x), r = x - n;
  Vec p = fma(set1(1.5353362e-4f), r, set1(1.3398875e-3f));
  p = fma(p, r, set1(9.6184374e-3f));
  p = fma(p, r, set1(5.5503325e-2f));
  p = fma(p, r, set1(2.4022648e-1f));
  p = fma(p, r, set1(6.9314720e-1f));
  return scale_by_power_of_2(fma(p, r, set1(1.0f)), n);
}

template <class T>
class Array {  // cache-aligned, uninitialised
 public:
  explicit Array(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes > 0 ? bytes : 64)));
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

int64_t groups(int64_t dim) { return (dim + kGroup - 1) / kGroup; }

// One row and one group of channels. Steps are counted in the direction of the scan.
template <class T, int kStates>
class Scan {
 public:
  explicit Scan(const SelectiveScan& a)
      : a_(a),
        states_(round_up(a.state, kStates)),
        B_(kChunk * states_),
        C_(kChunk * states_),
        dt_(kChunk),
        dtu_(kChunk),
        u_(kChunk),
        sum_(kChunk) {}

  void forward(int64_t row, int64_t first_channel, int64_t channels) {
    row_ = row;
    const int64_t blocks = (channels + kLanes - 1) / kLanes;
    const Array<Vec> A(blocks * states_), h(blocks * states_);
    load_A(A, first_channel, channels);
    for (int64_t i = 0; i < blocks * states_; ++i) h[i] = set1(0.0f);
    for (int64_t i = 0; i < chunks(); ++i) {
      load_chunk(a_.reverse ? chunks() - 1 - i : i);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t channel = first_channel + block * kLanes, left = channels - block * kLanes;
        Vec* state = h.get() + block * states_;
        for (int64_t n = 0; n < a_.state; ++n) store_some(kept_state(n) + channel, state[n], left);
        load_inputs(channel, left);
        for (int64_t s = 0; s < steps_; ++s) sum_[s] = set1(0.0f);
        for (int64_t n = 0; n < states_; n += kStates)
          advance<false>(A.get() + block * states_ + n, state + n, n, nullptr, nullptr);
        store_outputs(channel, left);
      }
    }
  }

  void backward(const SelectiveScanBackward& b, int64_t row, int64_t group, int64_t first_channel, int64_t channels) {
    row_ = row;
    const int64_t blocks = (channels + kLanes - 1) / kLanes, width = blocks * states_;
    const Array<Vec> A(width), state(states_), adjoint(width), dA(width), dD(blocks), dbias(blocks);
    const Array<Vec> a_of(kChunk * states_), carried_of(kChunk * states_), dB(kChunk * states_), dC(kChunk * states_);
    load_A(A, first_channel, channels);
    for (int64_t i = 0; i < width; ++i) adjoint[i] = dA[i] = set1(0.0f);
    for (int64_t i = 0; i < blocks; ++i) dD[i] = dbias[i] = set1(0.0f);
    for (int64_t i = 0; i < chunks(); ++i) {
      load_chunk(a_.reverse ? i : chunks() - 1 - i);
      for (int64_t j = 0; j < steps_ * states_; ++j) dB[j] = dC[j] = set1(0.0f);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t channel = first_channel + block * kLanes, left = channels - block * kLanes;
        for (int64_t n = 0; n < states_; ++n)
          state[n] = n < a_.state ? load_some(kept_state(n) + channel, left) : set1(0.0f);
        load_inputs(channel, left);
        for (int64_t s = 0; s < steps_; ++s) sum_[s] = ddt_[s] = ddtu_[s] = set1(0.0f);
        for (int64_t n = 0; n < states_; n += kStates)
          advance<true>(A.get() + block * states_ + n, state.get() + n, n, a_of.get(), carried_of.get());
        dD[block] = dD[block] + load_gradients(b, channel, left);
        for (int64_t n = 0; n < states_; n += kStates) {
          const int64_t j = block * states_ + n;
          retreat(A.get() + j, adjoint.get() + j, dA.get() + j, n, a_of.get(), carried_of.get(), dB.get(), dC.get());
        }
        dbias[block] = dbias[block] + store_gradients(b, channel, left);
      }
      reduce(dB.get(), b.dB, group);
      reduce(dC.get(), b.dC, group);
    }
    store_parameters(b, first_channel, channels, dA, dD, dbias);
  }

 private:
  int64_t chunks() const { return (a_.length + kChunk - 1) / kChunk; }
  int64_t time(int64_t step) const { return a_.reverse ? begin_ + steps_ - 1 - step : begin_ + step; }
  int64_t segment(int64_t step) const { return a_.segments[row_ * a_.length + time(step)]; }
  float* kept_state(int64_t n) const { return a_.states + ((row_ * chunks() + chunk_) * a_.state + n) * a_.dim; }

  // True where another document, or padding, is at the step before (which may lie in the chunk before).
  bool border(int64_t step) const {
    if (a_.segments == nullptr) return false;
    const int64_t before = time(step - 1), here = time(step);
    if (before < 0 || here < 0 || before >= a_.length || here >= a_.length) return false;
    return segment(step) != segment(step - 1);
  }

  static constexpr float kLog2e = 1.44269504f;

  template <class P>
  static Vec load_some(const P* p, int64_t left) {
    return left >= kLanes ? load(p) : load(p, left);
  }
  template <class P>
  static void store_some(P* p, Vec x, int64_t left) {
    if (left >= kLanes) return store(p, x);
    store(p, x, left);
  }

  // A log2(e), (blocks, states, lanes); 0 in the states that pad the last group of kStates.
  void load_A(const Array<Vec>& A, int64_t first_channel, int64_t channels) const {
    float lanes[kLanes];
    for (int64_t block = 0; block * kLanes < channels; ++block) {
      for (int64_t n = 0; n < states_; ++n) {
        for (int64_t i = 0; i < kLanes; ++i) {
          const int64_t channel = block * kLanes + i;
          const bool real = n < a_.state && channel < channels;
          lanes[i] = real ? a_.A[(first_channel + channel) * a_.state + n] * kLog2e : 0.0f;
        }
        A[block * states_ + n] = load(lanes);
      }
    }
  }

  // B, C, padding and borders of chunk c.
  void load_chunk(int64_t c) {
    chunk_ = c;
    begin_ = c * kChunk;
    steps_ = a_.length - begin_ < kChunk ? a_.length - begin_ : kChunk;
    for (int64_t s = 0; s < steps_; ++s) {
      const int64_t at = row_ * a_.length + time(s);
      widen(static_cast<const T*>(a_.B) + at * a_.state, B_.get() + s * states_);
      widen(static_cast<const T*>(a_.C) + at * a_.state, C_.get() + s * states_);
      padding_[s] = a_.segments != nullptr && segment(s) == 0;
    }
    for (int64_t s = 0; s <= steps_; ++s) fresh_[s] = border(s);
  }

  void widen(const T* x, float* out) const {
    int64_t n = 0;
    for (; n + kLanes <= a_.state; n += kLanes) store(out + n, load(x + n));
    if (n < a_.state) store(out + n, load(x + n, a_.state - n), a_.state - n);
    for (n = a_.state; n < states_; ++n) out[n] = 0.0f;
  }

  int64_t offset(int64_t step, int64_t channel) const { return (row_ * a_.length + time(step)) * a_.dim + channel; }

  Vec raw_delta(int64_t step, int64_t channel, int64_t left) const {
    const Vec x = load_some(static_cast<const T*>(a_.delta) + offset(step, channel), left);
    return a_.bias != nullptr ? x + load_some(a_.bias + channel, left) : x;
  }

  void load_inputs(int64_t channel, int64_t left) {
    for (int64_t s = 0; s < steps_; ++s) {
      if (padding_[s]) {
        u_[s] = dt_[s] = dtu_[s] = set1(0.0f);
        continue;
      }
      const Vec x = raw_delta(s, channel, left);
      u_[s] = load_some(static_cast<const T*>(a_.u) + offset(s, channel), left);
      dt_[s] = a_.softplus ? softplus(x) : x;
      dtu_[s] = dt_[s] * u_[s];
    }
  }

  // kStates states from n on, over a chunk: h moves on; <C, h> is added to sum_; exp(dt A) and exp(dt A) h are kept.
  template <bool kKeep>
  void advance(const Vec* A, Vec* state, int64_t n, Vec* a_of, Vec* carried_of) {
    Vec h[kStates];
#pragma GCC unroll 16
    for (int i = 0; i < kStates; ++i) h[i] = state[i];
    for (int64_t s = 0; s < steps_; ++s) {
      if (fresh_[s]) {
#pragma GCC unroll 16
        for (int i = 0; i < kStates; ++i) h[i] = set1(0.0f);
      }
      const Vec dt = dt_[s], dtu = dtu_[s];
      const float *B = B_.get() + s * states_ + n, *C = C_.get() + s * states_ + n;
      Vec sum = set1(0.0f), sum2 = set1(0.0f);
#pragma GCC unroll 16
      for (int i = 0; i < kStates; ++i) {
        const Vec a = exp2(dt * A[i]);
        const Vec carried = a * h[i];
        if constexpr (kKeep) carried_of[s * states_ + n + i] = carried;
        h[i] = fma(dtu, set1(B[i]), carried);
        if constexpr (kKeep) a_of[s * states_ + n + i] = a;
        (i % 2 == 0 ? sum : sum2) = fma(h[i], set1(C[i]), i % 2 == 0 ? sum : sum2);
      }
      sum_[s] = sum_[s] + (sum + sum2);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kStates; ++i) state[i] = h[i];
  }

  void store_outputs(int64_t channel, int64_t left) {
    for (int64_t s = 0; s < steps_; ++s) {
      T* y = static_cast<T*>(a_.y) + offset(s, channel);
      if (padding_[s]) {
        store_some(y, set1(0.0f), left);
        continue;
      }
      Vec sum = sum_[s];
      if (a_.D != nullptr) sum = fma(load_some(a_.D + channel, left), u_[s], sum);
      if (a_.z != nullptr) {
        const Vec z = load_some(static_cast<const T*>(a_.z) + offset(s, channel), left);
        sum = sum * (z * sigmoid(z));
      }
      store_some(y, sum, left);
    }
  }

  // dy (of <C, h>) into dy_, and the gradient of z; returns what the chunk adds to that of D.
  Vec load_gradients(const SelectiveScanBackward& b, int64_t channel, int64_t left) {
    Vec dD = set1(0.0f);
    const Vec D = a_.D != nullptr ? load_some(a_.D + channel, left) : set1(0.0f);
    for (int64_t s = 0; s < steps_; ++s) {
      const int64_t at = offset(s, channel);
      Vec dy = padding_[s] ? set1(0.0f) : load_some(static_cast<const T*>(b.grad) + at, left);
      if (a_.z != nullptr) {
        const Vec z = load_some(static_cast<const T*>(a_.z) + at, left), gate = sigmoid(z);
        const Vec slope = gate * fma(z, set1(1.0f) - gate, set1(1.0f));
        const Vec dz = padding_[s] ? set1(0.0f) : dy * fma(D, u_[s], sum_[s]) * slope;
        store_some(static_cast<T*>(b.dz) + at, dz, left);
        dy = padding_[s] ? set1(0.0f) : dy * (z * gate);
      }
      dy_[s] = dy;
      dD = fma(dy, u_[s], dD);
    }
    return dD;
  }

  // The chunk backwards: the adjoint of the state moves on, its parts go to dA, ddt_, ddtu_, dB and dC.
  void retreat(const Vec* A, Vec* adjoint, Vec* dA, int64_t n, const Vec* a_of, const Vec* carried_of, Vec* dB,
               Vec* dC) {
    Vec g[kStates];
#pragma GCC unroll 16
    for (int i = 0; i < kStates; ++i) g[i] = adjoint[i];
    for (int64_t s = steps_ - 1; s >= 0; --s) {
      if (fresh_[s + 1]) {
#pragma GCC unroll 16
        for (int i = 0; i < kStates; ++i) g[i] = set1(0.0f);
      }
      const Vec dt = dt_[s], dtu = dtu_[s], dy = dy_[s];
      const float *B = B_.get() + s * states_ + n, *C = C_.get() + s * states_ + n;
      const int64_t at = s * states_ + n;
      Vec ddt = set1(0.0f), ddtu = set1(0.0f);
#pragma GCC unroll 16
      for (int i = 0; i < kStates; ++i) {
        const Vec carried = carried_of[at + i], h = fma(dtu, set1(B[i]), carried);
        g[i] = fma(dy, set1(C[i]), g[i]);
        dC[at + i] = fma(dy, h, dC[at + i]);
        dB[at + i] = fma(g[i], dtu, dB[at + i]);
        ddtu = fma(g[i], set1(B[i]), ddtu);
        const Vec through = g[i] * carried;  // dL / d(dt A)
        ddt = fma(through, A[i], ddt);
        dA[i] = fma(through, dt, dA[i]);
        g[i] = g[i] * a_of[at + i];
      }
      ddt_[s] = ddt_[s] + ddt;
      ddtu_[s] = ddtu_[s] + ddtu;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kStates; ++i) adjoint[i] = g[i];
  }

  // The gradients of u and delta; returns what the chunk adds to that of the bias.
  Vec store_gradients(const SelectiveScanBackward& b, int64_t channel, int64_t left) {
    const Vec D = a_.D != nullptr ? load_some(a_.D + channel, left) : set1(0.0f);
    Vec dbias = set1(0.0f);
    for (int64_t s = 0; s < steps_; ++s) {
      const int64_t at = offset(s, channel);
      Vec du = fma(ddtu_[s], dt_[s], dy_[s] * D);
      Vec ddelta = fma(ddtu_[s], u_[s], ddt_[s] * set1(1.0f / kLog2e));
      if (padding_[s]) {
        du = ddelta = set1(0.0f);
      } else if (a_.softplus) {
        ddelta = ddelta * sigmoid(raw_delta(s, channel, left));
      }
      store_some(static_cast<T*>(b.du) + at, du, left);
      store_some(static_cast<T*>(b.ddelta) + at, ddelta, left);
      dbias = dbias + ddelta;
    }
    return dbias;
  }

  void reduce(const Vec* x, float* out, int64_t group) const {
    for (int64_t s = 0; s < steps_; ++s) {
      float* to = out + ((group * a_.batch + row_) * a_.length + time(s)) * a_.state;
      for (int64_t n = 0; n < a_.state; ++n) to[n] = reduce_add(x[s * states_ + n]);
    }
  }

  void store_parameters(const SelectiveScanBackward& b, int64_t first_channel, int64_t channels, const Array<Vec>& dA,
                        const Array<Vec>& dD, const Array<Vec>& dbias) const {
    float lanes[kLanes];
    for (int64_t block = 0; block * kLanes < channels; ++block) {
      const int64_t channel = row_ * a_.dim + first_channel + block * kLanes, left = channels - block * kLanes;
      store_some(b.dD + channel, dD[block], left);
      store_some(b.dbias + channel, dbias[block], left);
      for (int64_t n = 0; n < a_.state; ++n) {
        store(lanes, dA[block * states_ + n]);
        for (int64_t i = 0; i < kLanes && i < left; ++i) b.dA[(channel + i) * a_.state + n] = lanes[i];
      }
    }
  }

  const SelectiveScan& a_;
  const int64_t states_;
  int64_t row_ = 0, chunk_ = 0, begin_ = 0, steps_ = 0;
  Array<float> B_, C_;
  Array<Vec> dt_, dtu_, u_, sum_;
  Array<Vec> dy_{kChunk}, ddt_{kChunk}, ddtu_{kChunk};
  bool fresh_[kChunk + 1] = {}, padding_[kChunk] = {};
};

template <class F>
void dispatch(const SelectiveScan& a, const F& f) {
  visit(a.dtype, [&]<class T>(T) {
    if (kMaxStates > 8 && a.state > 8) {
      Scan<T, kMaxStates> scan(a);
      f(scan);
    } else {
      Scan<T, 8> scan(a);
      f(scan);
    }
  });
}

template <class F>
void for_items(const SelectiveScan& a, int64_t begin, int64_t end, const F& f) {
  const int64_t count = groups(a.dim);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item % count * kGroup;
    f(item / count, item % count, first, a.dim - first < kGroup ? a.dim - first : kGroup);
  }
}

void forward(const SelectiveScan& a, int64_t begin, int64_t end) {
  dispatch(a, [&](auto& scan) {
    for_items(a, begin, end,
              [&](int64_t row, int64_t, int64_t first, int64_t count) { scan.forward(row, first, count); });
  });
}

void backward(const SelectiveScanBackward& b, int64_t begin, int64_t end) {
  dispatch(b.forward, [&](auto& scan) {
    for_items(b.forward, begin, end, [&](int64_t row, int64_t group, int64_t first, int64_t count) {
      scan.backward(b, row, group, first, count);
    });
  });
}

}  // namespace

const SelectiveScanKernels selective_scan_kernels = {groups, forward, backward};

}  // namespace uz::UZ_ISA

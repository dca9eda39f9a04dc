// Retention, chunkwise. Floor: 8 K V flops a token and head for the two states (bidirectional), plus 2 C (K + V) within
// chunks of C tokens; every product runs on tiles held in registers, all operands in L1 and L2 (C = 64, K = 64,
// V = 128: 190 KiB), so the floor is the machine's fp32 multiply-add rate. Each document is walked by itself, chunks
// counted from its start: no masks, and padding costs nothing. A first walk leftwards over k and v keeps the state that
// enters each chunk from the right; a second one rightwards does the rest and writes each output once.
#include <cmath>
#include <cstdlib>
#include <memory>

#include "common/gemm.h"
#include "retention/kernels.h"

namespace uz::UZ_ISA {
namespace {

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

Buffer zeros(int64_t count) {
  const size_t bytes = static_cast<size_t>(round_up(count, 16)) * sizeof(float);
  Buffer buffer(static_cast<float*>(std::aligned_alloc(64, bytes)));
  for (int64_t i = 0; i < count; ++i) buffer.get()[i] = 0.0f;
  return buffer;
}

template <class T>
class Worker {
 public:
  explicit Worker(const Retention& a)
      : a_(a),
        chunk_(a.chunk),
        ldk_(round_up(a.key, kLanes)),
        ldv_(round_up(a.value, kLanes)),
        ldc_(round_up(a.chunk, kLanes)),
        rows_(round_up(a.chunk, 4)),
        q_(zeros(rows_ * ldk_)),
        k_(zeros(rows_ * ldk_)),
        v_(zeros(rows_ * ldv_)),
        scaled_(zeros(rows_ * ldk_)),
        k_columns_(zeros(ldk_ * ldc_)),
        scores_(zeros(rows_ * ldc_)),
        state_(zeros(a.key * ldv_)),
        later_(zeros(a.mode == RetentionMode::causal ? 0 : (a.length - 1) / chunk_ * a.key * ldv_)),
        o_(zeros(rows_ * ldv_)),
        power_(zeros(chunk_ + 1)),
        decay_(zeros(2 * ldc_ + chunk_)) {}

  void run(int64_t row, int64_t head) {
    set_decay(a_.log_decay[head]);
    const int64_t first = row * a_.length;
    for (int64_t start = 0; start < a_.length;) {
      int64_t stop = a_.length;
      bool padding = false;
      if (a_.segments != nullptr) {
        const int64_t id = a_.segments[first + start];
        padding = id == 0;
        for (stop = start + 1; stop < a_.length && a_.segments[first + stop] == id;) ++stop;
      }
      if (padding) {
        clear(first + start, first + stop, head);
      } else {
        document(first + start, stop - start, head);
      }
      start = stop;
    }
  }

 private:
  void set_decay(float log_decay) {
    for (int64_t i = 0; i <= chunk_; ++i) power_.get()[i] = static_cast<float>(std::exp(double(log_decay) * double(i)));
    for (int64_t i = 0; i < 2 * ldc_ + chunk_; ++i) {  // decay_[i] belongs to m - n = i - (chunk - 1)
      const int64_t offset = i - (chunk_ - 1), distance = offset < 0 ? -offset : offset;
      const bool seen =
          a_.mode == RetentionMode::both || (a_.mode == RetentionMode::causal ? offset <= 0 : offset >= 0);
      decay_.get()[i] = seen && distance <= chunk_ ? power_.get()[distance] : 0.0f;
    }
  }

  // One document: tokens first to first + length - 1 of the batch.
  void document(int64_t first, int64_t length, int64_t head) {
    const int64_t chunks = (length + chunk_ - 1) / chunk_;
    const bool earlier = a_.mode != RetentionMode::anticausal, later = a_.mode != RetentionMode::causal;
    if (later) keep_later_states(first, length, head, chunks);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t start = c * chunk_, n = c + 1 < chunks ? chunk_ : length - start;
      read(a_.q, a_.key, ldk_, q_.get(), first + start, n, head);
      read(a_.k, a_.key, ldk_, k_.get(), first + start, n, head);
      read(a_.v, a_.value, ldv_, v_.get(), first + start, n, head);
      own_chunk(n);
      if (earlier && c > 0) {
        scale(q_.get(), n, [&](int64_t i) { return power_.get()[i + 1]; });
        gemm<true>({scaled_.get(), ldk_, 1}, state_.get(), ldv_, o_.get(), ldv_, n, a_.value, a_.key);
      }
      if (later && c + 1 < chunks) {
        scale(q_.get(), n, [&](int64_t i) { return power_.get()[n - i]; });
        gemm<true>({scaled_.get(), ldk_, 1}, later_state(c), ldv_, o_.get(), ldv_, n, a_.value, a_.key);
      }
      if (earlier && c + 1 < chunks) {
        scale(k_.get(), n, [&](int64_t i) { return power_.get()[n - 1 - i]; });
        pass_on(c > 0 ? state_.get() : nullptr, state_.get(), n);
      }
      write(first + start, n, head);
    }
  }

  // The state that enters chunk c from the right: the sum over later tokens m of decay^(m - end of c) k_m v_m^T.
  float* later_state(int64_t c) const { return later_.get() + c * a_.key * ldv_; }

  void keep_later_states(int64_t first, int64_t length, int64_t head, int64_t chunks) {
    for (int64_t c = chunks - 1; c > 0; --c) {
      const int64_t start = c * chunk_, n = c + 1 < chunks ? chunk_ : length - start;
      read(a_.k, a_.key, ldk_, k_.get(), first + start, n, head);
      read(a_.v, a_.value, ldv_, v_.get(), first + start, n, head);
      scale(k_.get(), n, [&](int64_t i) { return power_.get()[i]; });
      pass_on(c + 1 < chunks ? later_state(c) : nullptr, later_state(c - 1), n);
    }
  }

  // to = decay^n from + (scaled keys)^T v
  void pass_on(const float* from, float* to, int64_t n) {
    const Matrix keys = {scaled_.get(), 1, ldk_};
    if (from == nullptr) return gemm<false>(keys, v_.get(), ldv_, to, ldv_, a_.key, a_.value, n);
    const Vec carry = set1(power_.get()[n]);
    for (int64_t i = 0; i < a_.key * ldv_; i += kLanes) store(to + i, carry * load(from + i));
    gemm<true>(keys, v_.get(), ldv_, to, ldv_, a_.key, a_.value, n);
  }

  void own_chunk(int64_t n) {
    transpose(k_.get(), ldk_, k_columns_.get(), ldc_, n, a_.key);
    gemm<false>({q_.get(), ldk_, 1}, k_columns_.get(), ldc_, scores_.get(), ldc_, n, n, a_.key);
    for (int64_t i = 0; i < n; ++i) {
      float* row = scores_.get() + i * ldc_;
      const float* decay = decay_.get() + (chunk_ - 1 - i);
      for (int64_t j = 0; j < n; j += kLanes) store(row + j, load(row + j) * load(decay + j));
    }
    gemm<false>({scores_.get(), ldc_, 1}, v_.get(), ldv_, o_.get(), ldv_, n, a_.value, n);
  }

  static void read_row(const T* x, int64_t width, float* out) {
    int64_t j = 0;
    for (; j + kLanes <= width; j += kLanes) store(out + j, load(x + j));
    if (j < width) store(out + j, load(x + j, width - j));
  }

  void read(const void* x, int64_t width, int64_t ld, float* out, int64_t first, int64_t n, int64_t head) const {
    const T* from = static_cast<const T*>(x) + (first * a_.heads + head) * width;
    for (int64_t i = 0; i < n; ++i) read_row(from + i * a_.heads * width, width, out + i * ld);
  }

  template <class Weight>
  void scale(const float* x, int64_t n, const Weight& weight) {
    for (int64_t i = 0; i < n; ++i) {
      const Vec w = set1(weight(i));
      for (int64_t j = 0; j < ldk_; j += kLanes) store(scaled_.get() + i * ldk_ + j, w * load(x + i * ldk_ + j));
    }
  }

  void write(int64_t first, int64_t n, int64_t head) const {
    T* out = static_cast<T*>(a_.o) + (first * a_.heads + head) * a_.value;
    for (int64_t i = 0; i < n; ++i, out += a_.heads * a_.value) {
      const float* sum = o_.get() + i * ldv_;
      int64_t j = 0;
      for (; j + kLanes <= a_.value; j += kLanes) store(out + j, load(sum + j));
      if (j < a_.value) store(out + j, load(sum + j), a_.value - j);
    }
  }

  void clear(int64_t begin, int64_t end, int64_t head) {
    for (int64_t i = begin; i < end; ++i) {
      T* out = static_cast<T*>(a_.o) + (i * a_.heads + head) * a_.value;
      for (int64_t j = 0; j < a_.value; ++j) out[j] = T{};
    }
  }

  const Retention& a_;
  const int64_t chunk_, ldk_, ldv_, ldc_, rows_;
  Buffer q_, k_, v_, scaled_, k_columns_, scores_, state_, later_, o_, power_, decay_;
};

void retention(const Retention& a, int64_t begin, int64_t end) {
  visit(a.dtype, [&]<class T>(T) {
    Worker<T> worker(a);
    for (int64_t item = begin; item < end; ++item) worker.run(item / a.heads, item % a.heads);
  });
}

}  // namespace

const RetentionKernels retention_kernels = {retention};

}  // namespace uz::UZ_ISA

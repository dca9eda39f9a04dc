// What waits for other threads, or meets them in memory.
#pragma once

#include "vector_types.h"

#define SIMT_HERE \
  ::simt::Site { file, line }

inline void __syncthreads(SIMT_SITE) { simt::barrier(false, SIMT_HERE); }
inline int __syncthreads_count(int vote, SIMT_SITE) { return simt::barrier(vote != 0, SIMT_HERE); }
inline int __syncthreads_or(int vote, SIMT_SITE) { return simt::barrier(vote != 0, SIMT_HERE) > 0; }
inline int __syncthreads_and(int vote, SIMT_SITE) { return simt::barrier(vote == 0, SIMT_HERE) == 0; }

inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) {
  simt::exchange(simt::WarpOp::sync, mask, {}, 0, 32, SIMT_HERE);
}

#define SIMT_SHUFFLE(NAME, OP)                                                                                 \
  template <class T>                                                                                           \
  inline T NAME(unsigned mask, T value, int lane, int width = 32, SIMT_SITE) {                                 \
    return simt::unpack<T>(simt::exchange(simt::WarpOp::OP, mask, simt::pack(value), lane, width, SIMT_HERE)); \
  }
SIMT_SHUFFLE(__shfl_sync, index)
SIMT_SHUFFLE(__shfl_up_sync, up)
SIMT_SHUFFLE(__shfl_down_sync, down)
SIMT_SHUFFLE(__shfl_xor_sync, exclusive_or)
#undef SIMT_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int vote, SIMT_SITE) {
  const unsigned bit = vote != 0;
  return simt::unpack<unsigned>(simt::exchange(simt::WarpOp::ballot, mask, simt::pack(bit), 0, 32, SIMT_HERE));
}
inline int __any_sync(unsigned mask, int vote, SIMT_SITE) { return __ballot_sync(mask, vote, file, line) != 0; }
inline int __all_sync(unsigned mask, int vote, SIMT_SITE) { return __ballot_sync(mask, vote == 0, file, line) == 0; }

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

namespace simt {

// *p = f(*p), atomically; returns what was there.
template <class T, class F>
T atomic(T* p, const F& f) {
  maybe_yield();
  T old, wanted;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do wanted = f(old);
  while (!__atomic_compare_exchange(p, &old, &wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

template <class T>
struct Same {  // keeps a parameter out of template deduction
  using type = T;
};

}  // namespace simt

#define SIMT_ATOMIC(NAME, EXPRESSION)                                          \
  template <class T>                                                           \
  inline T NAME(T* p, typename simt::Same<T>::type x) {                        \
    return simt::atomic(p, [x](T old) { return static_cast<T>(EXPRESSION); }); \
  }
SIMT_ATOMIC(atomicAdd, old + x)
SIMT_ATOMIC(atomicMax, old < x ? x : old)
SIMT_ATOMIC(atomicMin, x < old ? x : old)
SIMT_ATOMIC(atomicOr, old | x)
SIMT_ATOMIC(atomicAnd, old& x)
SIMT_ATOMIC(atomicExch, ((void)old, x))
#undef SIMT_ATOMIC

template <class T>
inline T atomicCAS(T* p, typename simt::Same<T>::type expected, typename simt::Same<T>::type x) {
  return simt::atomic(p, [=](T old) { return old == expected ? x : old; });
}

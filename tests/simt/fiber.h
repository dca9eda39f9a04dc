// A stack to run on, and the change from one to another, which the sanitizers are told of.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define SIMT_POISON(memory, bytes) ASAN_POISON_MEMORY_REGION(memory, bytes)
#define SIMT_UNPOISON(memory, bytes) ASAN_UNPOISON_MEMORY_REGION(memory, bytes)
#else
#define SIMT_POISON(memory, bytes) (void)(memory)
#define SIMT_UNPOISON(memory, bytes) (void)(memory)
#endif

// ThreadSanitizer: the kernels are instrumented (-fsanitize=thread), these files are not, so that what they do between
// two threads of a kernel orders nothing. SIMT_TSAN makes them say what does.
#if defined(SIMT_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace simt {

// After release(x) and then acquire(x) in another thread, that thread may use what the first wrote before.
inline void acquire([[maybe_unused]] void* address) {
#if defined(SIMT_TSAN)
  __tsan_acquire(address);
#endif
}

inline void release([[maybe_unused]] void* address) {
#if defined(SIMT_TSAN)
  __tsan_release(address);
#endif
}

struct Fiber {
  char* stack = nullptr;  // null: the stack of the CPU's thread
  size_t bytes = 0;
  void* sanitizer = nullptr;  // AddressSanitizer's frames, or ThreadSanitizer's fiber
#if defined(__x86_64__)
  void* top = nullptr;
#else
  ucontext_t context = {};
#endif
};

// The running code becomes a fiber.
Fiber adopt();
Fiber make_fiber(char* stack, size_t bytes);
void destroy(Fiber& fiber);

// Puts entry() at the start of the stack, `offset` bytes from its end, for the next change to the fiber. entry() has to
// call entered() first, and never returns; a fiber whose entry() has changed to another for good can be started again.
void start(Fiber& fiber, size_t offset, void (*entry)());
void entered(Fiber& from);

// Goes on with `to`; comes back when something changes to `from`.
void change(Fiber& from, Fiber& to, bool for_good);

}  // namespace simt

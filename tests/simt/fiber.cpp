#include "fiber.h"

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves the registers that a call keeps on the stack of one fiber and takes those of another.
extern "C" void simt_change(void** from, void* to);
asm(R"(
  .text
  .hidden simt_change
  .globl simt_change
  .type simt_change, @function
simt_change:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size simt_change, . - simt_change
)");
#endif

namespace simt {

Fiber adopt() {
  Fiber fiber;
#if defined(SIMT_TSAN)
  fiber.sanitizer = __tsan_get_current_fiber();
#endif
  return fiber;
}

Fiber make_fiber(char* stack, size_t bytes) {
  Fiber fiber;
  fiber.stack = stack, fiber.bytes = bytes;
#if defined(SIMT_TSAN)
  fiber.sanitizer = __tsan_create_fiber(0);
#endif
  return fiber;
}

void destroy([[maybe_unused]] Fiber& fiber) {
#if defined(SIMT_TSAN)
  __tsan_destroy_fiber(fiber.sanitizer);
#endif
}

void start(Fiber& fiber, size_t offset, void (*entry)()) {
  char* const stack = fiber.stack;
  const size_t bytes = fiber.bytes;
  SIMT_UNPOISON(stack, bytes);  // frames that were left for good
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack + bytes - offset / 64 * 64 - 64);
  *--top = nullptr;  // entry() returns nowhere
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.top = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes - offset / 64 * 64;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

void entered([[maybe_unused]] Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack = nullptr;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &from.bytes);
  from.stack = static_cast<char*>(const_cast<void*>(stack));
#endif
}

void change(Fiber& from, Fiber& to, [[maybe_unused]] bool for_good) {
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(to.sanitizer, 1);  // 1: a switch orders nothing
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.sanitizer, to.stack, to.bytes);
#endif
#if defined(__x86_64__)
  simt_change(&from.top, to.top);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
#endif
}

}  // namespace simt

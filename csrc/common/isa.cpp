#include "common/isa.h"

#include <atomic>
#include <cstring>

namespace uz {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512vnni"};

Isa detect() {
#if defined(UZ_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512vnni")) return Isa::avx512vnni;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

std::atomic<Isa> current{detect()};

}  // namespace

Isa isa() { return current.load(std::memory_order_relaxed); }

}  // namespace uz

#define UZ_EXPORT extern "C" __attribute__((visibility("default")))

// build.py looks for this text in the file, so as to tell which sources a library was built from.
UZ_EXPORT const char ultrazoo_build_key[] = "ultrazoo-build-key:" UZ_BUILD_KEY;

UZ_EXPORT const char* ultrazoo_cpu_isa() { return uz::kNames[static_cast<int>(uz::isa())]; }

// Chooses a set by name, or the best one for "". Returns 0, or 1 when this CPU lacks it.
UZ_EXPORT int ultrazoo_set_cpu_isa(const char* name) {
  const uz::Isa best = uz::detect();
  if (*name == '\0') {
    uz::current = best;
    return 0;
  }
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    if (std::strcmp(name, uz::kNames[i]) == 0) {
      uz::current = static_cast<uz::Isa>(i);
      return 0;
    }
  }
  return 1;
}

// Run-time choice between the instruction sets that each cpu.cpp is compiled for.
#pragma once

#if defined(__x86_64__)
#define UZ_X86 1
#endif

namespace uz {

enum class Isa : int { portable, avx2, avx512, avx512vnni };

// The best set that this CPU offers, or a lower one chosen with ultrazoo_set_cpu_isa.
Isa isa();

}  // namespace uz

// UZ_KERNELS(Table, name), inside namespace uz: declares the constant uz::<isa>::name, which each compilation of the
// op's cpu.cpp defines, and the function uz::name() that returns the one for this CPU.
// UZ_KERNELS_VNNI: the same for an op that build.py compiles for avx512vnni too.
#define UZ_TABLE(ISA, TABLE, NAME) \
  namespace ISA {                  \
  extern const TABLE NAME;         \
  }

#if defined(UZ_X86)
#define UZ_KERNELS(TABLE, NAME)                              \
  UZ_TABLE(portable, TABLE, NAME)                            \
  UZ_TABLE(avx2, TABLE, NAME)                                \
  UZ_TABLE(avx512, TABLE, NAME)                              \
  static inline const TABLE& NAME() {                        \
    if (isa() >= Isa::avx512) return avx512::NAME;           \
    return isa() == Isa::avx2 ? avx2::NAME : portable::NAME; \
  }
#define UZ_KERNELS_VNNI(TABLE, NAME)                         \
  UZ_TABLE(portable, TABLE, NAME)                            \
  UZ_TABLE(avx2, TABLE, NAME)                                \
  UZ_TABLE(avx512, TABLE, NAME)                              \
  UZ_TABLE(avx512vnni, TABLE, NAME)                          \
  static inline const TABLE& NAME() {                        \
    if (isa() == Isa::avx512vnni) return avx512vnni::NAME;   \
    if (isa() == Isa::avx512) return avx512::NAME;           \
    return isa() == Isa::avx2 ? avx2::NAME : portable::NAME; \
  }
#else
#define UZ_KERNELS(TABLE, NAME)   \
  UZ_TABLE(portable, TABLE, NAME) \
  static inline const TABLE& NAME() { return portable::NAME; }
#define UZ_KERNELS_VNNI(TABLE, NAME) UZ_KERNELS(TABLE, NAME)
#endif

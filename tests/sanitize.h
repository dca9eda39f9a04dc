// Put before every file that sanitize.py compiles. AddressSanitizer sees plain loads and stores, _mm512_loadu_ps and
// its like included, but not the compiler's built-in functions for masked ones: here each of these tells it first which
// elements it touches. sanitize.py refuses sources that use one that is missing here.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

extern "C" {
void __asan_loadN(const void* p, unsigned long bytes);
void __asan_storeN(void* p, unsigned long bytes);
}

namespace sanitize {

template <unsigned long kBytes>
static inline void reads(const void* p, unsigned long mask) {
  for (unsigned long i = 0; mask >> i != 0; ++i)
    if (mask >> i & 1) __asan_loadN(static_cast<const char*>(p) + i * kBytes, kBytes);
}

template <unsigned long kBytes>
static inline void writes(void* p, unsigned long mask) {
  for (unsigned long i = 0; mask >> i != 0; ++i)
    if (mask >> i & 1) __asan_storeN(static_cast<char*>(p) + i * kBytes, kBytes);
}

}  // namespace sanitize

#define SANITIZE_LANES(mask) _mm256_movemask_ps(_mm256_castsi256_ps(mask))
#define _mm256_maskload_ps(p, mask) (sanitize::reads<4>(p, SANITIZE_LANES(mask)), _mm256_maskload_ps(p, mask))
#define _mm256_maskstore_ps(p, mask, x) (sanitize::writes<4>(p, SANITIZE_LANES(mask)), _mm256_maskstore_ps(p, mask, x))
#define _mm256_maskz_loadu_epi16(mask, p) (sanitize::reads<2>(p, mask), _mm256_maskz_loadu_epi16(mask, p))
#define _mm256_mask_storeu_epi16(p, mask, x) (sanitize::writes<2>(p, mask), _mm256_mask_storeu_epi16(p, mask, x))
#define _mm512_maskz_loadu_ps(mask, p) (sanitize::reads<4>(p, mask), _mm512_maskz_loadu_ps(mask, p))
#define _mm512_mask_storeu_ps(p, mask, x) (sanitize::writes<4>(p, mask), _mm512_mask_storeu_ps(p, mask, x))
#define _mm_mask_storeu_epi8(p, mask, x) (sanitize::writes<1>(p, mask), _mm_mask_storeu_epi8(p, mask, x))
#endif

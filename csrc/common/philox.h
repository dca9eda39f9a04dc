// Philox4x32-10 (Salmon et al. 2011), kLanes blocks at a time, for cpu.cpp files: which elements dropout keeps.
//
//   Philox random(seed)            the key
//   random(c0, c1, c2, c3)         Draws: lane i is the block of the counter (c0 + i, c1, c2, c3), no carry out of c0
//   Keep keep(of_65536)            keeps an element where its 16 bits are below that number
//   keep(draws, slot, x)           x where the 16 bits of that slot keep it, else 0; slot 2 w is the low half of word w
//                                  of the block, slot 2 w + 1 the high one
#pragma once

#include "common/simd.h"

namespace uz::UZ_ISA {

inline constexpr int kPhiloxRounds = 10;
inline constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;

struct PhiloxKeys {
  uint32_t first[kPhiloxRounds], second[kPhiloxRounds];

  explicit PhiloxKeys(uint64_t seed) {
    for (uint32_t i = 0; i < kPhiloxRounds; ++i) {
      first[i] = static_cast<uint32_t>(seed) + i * 0x9E3779B9u;
      second[i] = static_cast<uint32_t>(seed >> 32) + i * 0xBB67AE85u;
    }
  }
};

#if UZ_ISA_LEVEL >= 1

// Words live in the low halves of 64-bit lanes, where one multiplication gives both halves of the product; what stands
// in the high halves is never read.
#if UZ_ISA_LEVEL >= 2
using Ints = __m512i;
inline Ints wide1(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
inline Ints even_lanes() { return _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi64(a, b); }
inline Ints times(Ints a, Ints b) { return _mm512_mul_epu32(a, b); }
inline Ints high(Ints a) { return _mm512_srli_epi64(a, 32); }
inline Ints xor3(Ints a, Ints b, Ints c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline Ints zip(Ints even, Ints odd) { return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)); }
#else
using Ints = __m256i;
inline Ints wide1(uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); }
inline Ints even_lanes() { return _mm256_set_epi64x(6, 4, 2, 0); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi64(a, b); }
inline Ints times(Ints a, Ints b) { return _mm256_mul_epu32(a, b); }
inline Ints high(Ints a) { return _mm256_srli_epi64(a, 32); }
inline Ints xor3(Ints a, Ints b, Ints c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline Ints zip(Ints even, Ints odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }
#endif

struct Draws {
  Ints word[4];
};

class Philox {
 public:
  explicit Philox(uint64_t seed) : keys_(seed) {}

  Draws operator()(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) const {
    const Ints m0 = wide1(kPhiloxM0), m1 = wide1(kPhiloxM1);
    Ints even[4] = {add(wide1(c0), even_lanes()), wide1(c1), wide1(c2), wide1(c3)};
    Ints odd[4] = {add(even[0], wide1(1)), even[1], even[2], even[3]};
#pragma GCC unroll 10
    for (int i = 0; i < kPhiloxRounds; ++i) {
      const Ints k0 = wide1(keys_.first[i]), k1 = wide1(keys_.second[i]);
      round(even, m0, m1, k0, k1);
      round(odd, m0, m1, k0, k1);
    }
    return {{zip(even[0], odd[0]), zip(even[1], odd[1]), zip(even[2], odd[2]), zip(even[3], odd[3])}};
  }

 private:
  static void round(Ints (&c)[4], Ints m0, Ints m1, Ints k0, Ints k1) {
    const Ints a = times(m0, c[0]), b = times(m1, c[2]);
    c[0] = xor3(high(b), c[1], k0);
    c[1] = b;
    c[2] = xor3(high(a), c[3], k1);
    c[3] = a;
  }

  PhiloxKeys keys_;
};

class Keep {
 public:
#if UZ_ISA_LEVEL >= 2
  explicit Keep(int64_t of_65536) : limit_(_mm512_set1_epi32(static_cast<int>(of_65536))) {}

  Vec operator()(const Draws& draws, int slot, Vec x) const {
    const Ints word = draws.word[slot / 2];
    const Ints bits = slot % 2 ? _mm512_srli_epi32(word, 16) : _mm512_and_si512(word, _mm512_set1_epi32(0xffff));
    return {_mm512_maskz_mov_ps(_mm512_cmplt_epi32_mask(bits, limit_), x.v)};
  }
#else
  explicit Keep(int64_t of_65536) : limit_(_mm256_set1_epi32(static_cast<int>(of_65536))) {}

  Vec operator()(const Draws& draws, int slot, Vec x) const {
    const Ints word = draws.word[slot / 2];
    const Ints bits = slot % 2 ? _mm256_srli_epi32(word, 16) : _mm256_and_si256(word, _mm256_set1_epi32(0xffff));
    return {_mm256_and_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(limit_, bits)), x.v)};
  }
#endif

 private:
  Ints limit_;
};

#else

struct Draws {
  uint32_t word[4][kLanes];
};

class Philox {
 public:
  explicit Philox(uint64_t seed) : keys_(seed) {}

  Draws operator()(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) const {
    Draws draws;
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      uint32_t c[4] = {c0 + lane, c1, c2, c3};
      for (int i = 0; i < kPhiloxRounds; ++i) {
        const uint64_t a = uint64_t{kPhiloxM0} * c[0], b = uint64_t{kPhiloxM1} * c[2];
        c[0] = static_cast<uint32_t>(b >> 32) ^ c[1] ^ keys_.first[i];
        c[1] = static_cast<uint32_t>(b);
        c[2] = static_cast<uint32_t>(a >> 32) ^ c[3] ^ keys_.second[i];
        c[3] = static_cast<uint32_t>(a);
      }
      for (int w = 0; w < 4; ++w) draws.word[w][lane] = c[w];
    }
    return draws;
  }

 private:
  PhiloxKeys keys_;
};

class Keep {
 public:
  explicit Keep(int64_t of_65536) : limit_(static_cast<uint32_t>(of_65536)) {}

  Vec operator()(const Draws& draws, int slot, Vec x) const {
    const uint32_t* word = draws.word[slot / 2];
    for (int i = 0; i < kLanes; ++i)
      if ((slot % 2 ? word[i] >> 16 : word[i] & 0xffffu) >= limit_) x.v[i] = 0.0f;
    return x;
  }

 private:
  uint32_t limit_;
};

#endif

}  // namespace uz::UZ_ISA

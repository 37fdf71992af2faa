// Vectors of the widest kind that this instruction set has, as GCC vector types: the same text
// serves the three builds. Internal to ops/cpu; every name lives in the build's own namespace.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#else
#include <cfenv>
#endif

#include "ops/cpu/isa.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {

#if defined(__AVX512BW__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

using VecF = float __attribute__((vector_size(kVectorBytes)));
using VecD = double __attribute__((vector_size(kVectorBytes)));
using VecI = std::int32_t __attribute__((vector_size(kVectorBytes)));
using VecU = std::uint32_t __attribute__((vector_size(kVectorBytes)));
using VecL = std::int64_t __attribute__((vector_size(kVectorBytes)));
using VecU8 = std::uint8_t __attribute__((vector_size(kVectorBytes)));
using VecI16 = std::int16_t __attribute__((vector_size(kVectorBytes)));
using HalfF = float __attribute__((vector_size(kVectorBytes / 2)));
using HalfI = std::int32_t __attribute__((vector_size(kVectorBytes / 2)));

inline constexpr int kLanes = kVectorBytes / 4;  // 32-bit lanes of a vector

template <typename V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V>
inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

// The two halves of a vector, and back.
#if defined(__AVX512DQ__)
inline HalfF low_half(VecF v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
inline HalfF high_half(VecF v) {
  return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}
inline VecF join(HalfF low, HalfF high) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}
#elif defined(__AVX2__)
inline HalfF low_half(VecF v) { return _mm256_castps256_ps128(v); }
inline HalfF high_half(VecF v) { return _mm256_extractf128_ps(v, 1); }
inline VecF join(HalfF low, HalfF high) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
}
#else
inline HalfF low_half(VecF v) { return HalfF{v[0], v[1]}; }
inline HalfF high_half(VecF v) { return HalfF{v[2], v[3]}; }
inline VecF join(HalfF low, HalfF high) { return VecF{low[0], low[1], high[0], high[1]}; }
#endif

// Whether a lane is above `bound`.
inline bool any_above(VecI v, std::int32_t bound) {
#if defined(__AVX512F__)
  return _mm512_cmpgt_epi32_mask(reinterpret_cast<__m512i>(v), _mm512_set1_epi32(bound)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8(reinterpret_cast<__m256i>(v > bound)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_epi8(reinterpret_cast<__m128i>(v > bound)) != 0;
#else
  return v[0] > bound || v[1] > bound || v[2] > bound || v[3] > bound;
#endif
}

inline VecI max(VecI a, VecI b) { return a > b ? a : b; }

inline VecU8 max(VecU8 a, VecU8 b) {
#if defined(__AVX512BW__)
  return reinterpret_cast<VecU8>(
      _mm512_max_epu8(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecU8>(
      _mm256_max_epu8(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<VecU8>(
      _mm_max_epu8(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return a > b ? a : b;
#endif
}

inline VecI16 max(VecI16 a, VecI16 b) {
#if defined(__AVX512BW__)
  return reinterpret_cast<VecI16>(
      _mm512_max_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecI16>(
      _mm256_max_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<VecI16>(
      _mm_max_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return a > b ? a : b;
#endif
}

// max(x, 0) and min(x, 0); a NaN stays one. (The masked forms are whole: GCC 12 warns of the plain
// ones.)
inline VecF above_zero(VecF x) {
#if defined(__AVX512F__)
  return _mm512_mask_max_ps(x, 0xFFFF, VecF{}, x);
#elif defined(__AVX2__)
  return _mm256_max_ps(VecF{}, x);
#elif defined(__SSE2__)
  return _mm_max_ps(VecF{}, x);
#else
  return x < 0.0f ? VecF{} : x;
#endif
}
inline VecF below_zero(VecF x) {
#if defined(__AVX512F__)
  return _mm512_mask_min_ps(x, 0xFFFF, VecF{}, x);
#elif defined(__AVX2__)
  return _mm256_min_ps(VecF{}, x);
#elif defined(__SSE2__)
  return _mm_min_ps(VecF{}, x);
#else
  return x > 0.0f ? VecF{} : x;
#endif
}
inline VecD above_zero(VecD x) {
#if defined(__AVX512F__)
  return _mm512_mask_max_pd(x, 0xFF, VecD{}, x);
#elif defined(__AVX2__)
  return _mm256_max_pd(VecD{}, x);
#elif defined(__SSE2__)
  return _mm_max_pd(VecD{}, x);
#else
  return x < 0.0 ? VecD{} : x;
#endif
}
inline VecD below_zero(VecD x) {
#if defined(__AVX512F__)
  return _mm512_mask_min_pd(x, 0xFF, VecD{}, x);
#elif defined(__AVX2__)
  return _mm256_min_pd(VecD{}, x);
#elif defined(__SSE2__)
  return _mm_min_pd(VecD{}, x);
#else
  return x > 0.0 ? VecD{} : x;
#endif
}

// a*b + c where a*b is exact, so that one rounding and two are the same.
inline VecF multiply_add(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
inline VecD multiply_add(VecD a, VecD b, VecD c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// FP32 and FP64 arithmetic of this thread rounds toward zero while one lives. NOTE: the compiler
// knows nothing of it: what relies on it stands in a function of its own that is not inlined, and
// what needs round-to-nearest outside.
class RoundTowardZero {
 public:
#if defined(__SSE2__)
  RoundTowardZero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | _MM_ROUND_TOWARD_ZERO); }
  ~RoundTowardZero() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  RoundTowardZero() : saved_(std::fegetround()) { std::fesetround(FE_TOWARDZERO); }
  ~RoundTowardZero() { std::fesetround(saved_); }

 private:
  int saved_;
#endif
  RoundTowardZero(const RoundTowardZero&) = delete;
  RoundTowardZero& operator=(const RoundTowardZero&) = delete;
};

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA

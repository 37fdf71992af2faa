// Elementary functions and the quantizer's scale, as fixed lists of FP32 operations
// (docs/numerics.md, sections 2 and 5). `fma` is std::fma: exact on every host, one instruction
// where the target has it.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "numerics/formats.h"

namespace lockstep::numerics {

inline constexpr float kLog2e = 0x1.715476p+0f;
inline constexpr float kLog2eLow = 0x1.4ae0cp-26f;
inline constexpr float kLn2 = 0x1.62e43p-1f;
inline constexpr float kLn2Low = -0x1.05c61p-29f;
inline constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
inline constexpr std::uint32_t kRoundMagicBits = 0x4B400000u;

LOCKSTEP_HD inline float fma(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// 2^n * p with p in [0.7, 1.42) and n in [-150, 128], rounded once.
LOCKSTEP_HD inline float scale_by_power(float p, std::uint32_t n) {
  const std::uint32_t half = static_cast<std::uint32_t>(static_cast<std::int32_t>(n) >> 1);
  return (p * bits_float((half + 127u) << 23)) * bits_float((n - half + 127u) << 23);
}

LOCKSTEP_HD inline float exp2_polynomial(float f) {
  float p = 0x1.41fbbap-13f;
  p = fma(p, f, 0x1.5f3e54p-10f);
  p = fma(p, f, 0x1.3b2d4cp-7f);
  p = fma(p, f, 0x1.c6aee8p-5f);
  p = fma(p, f, 0x1.ebfbdcp-3f);
  p = fma(p, f, 0x1.62e43p-1f);
  return fma(p, f, 1.0f);
}

// 2^x, relative error below 2^-22.5 (tests/numerics/math_test.cpp measures it over the whole
// range).
LOCKSTEP_HD inline float exp2(float x) {
  x = x < -150.0f ? -150.0f : x;
  x = x > 128.0f ? 128.0f : x;
  const float t = x + kRoundMagic;
  const float f = x - (t - kRoundMagic);
  return scale_by_power(exp2_polynomial(f), float_bits(t) - kRoundMagicBits);
}

// exp2(x) for x in [-190, 0], the same bits in half the operations: p is scaled by 2^(n + 64),
// which is exact, and then by 2^-64, which rounds once.
LOCKSTEP_HD inline float exp2_nonpositive(float x) {
  constexpr float kMagic = kRoundMagic + 64.0f;
  const float t = x + kMagic;
  const float f = x - (t - kMagic);
  return bits_float(float_bits(exp2_polynomial(f)) + (float_bits(t) << 23)) * 0x1p-64f;
}

// e^x, relative error below 2^-22.5.
LOCKSTEP_HD inline float exp(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 88.75f ? 88.75f : x;
  const float t = x * kLog2e + kRoundMagic;
  const float n = t - kRoundMagic;
  float f = fma(x, kLog2e, -n);
  f = fma(x, kLog2eLow, f);
  return scale_by_power(exp2_polynomial(f), float_bits(t) - kRoundMagicBits);
}

// 2^x for the softmax of attention, relative error below 1.02e-4 for x in [-126, 0.5]; below -127
// it is +0. For x <= 0.5 only.
LOCKSTEP_HD inline float exp2_softmax(float x) {
  x = x > -127.0f ? x : -127.0f;
  const float t = x + kRoundMagic;
  const float f = x - (t - kRoundMagic);
  float p = 0x1.c2a208p-5f;
  p = fma(p, f, 0x1.f00c4ep-3f);
  p = fma(p, f, 0x1.62f5fcp-1f);
  p = fma(p, f, 1.0f);
  return bits_float(float_bits(p) + (float_bits(t) << 23));
}

// Natural logarithm, error below 2^-22 relative (near 1 too). log(0) = -inf, log(x < 0) = NaN,
// log(inf) = inf.
LOCKSTEP_HD inline float log(float x) {
  const bool subnormal = x < 0x1p-126f;
  const float scaled = subnormal ? x * 0x1p23f : x;
  const std::uint32_t u = float_bits(scaled);
  const std::uint32_t shifted = u - 0x3F3504F3u;  // bits of sqrt(1/2)
  const float e =
      static_cast<float>(static_cast<std::int32_t>(shifted) >> 23) - (subnormal ? 23.0f : 0.0f);
  const float t = bits_float((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  float q = -0x1.383d96p-4f;
  q = fma(q, t, 0x1.084ep-3f);
  q = fma(q, t, -0x1.0f375cp-3f);
  q = fma(q, t, 0x1.22709cp-3f);
  q = fma(q, t, -0x1.54274ap-3f);
  q = fma(q, t, 0x1.99a402p-3f);
  q = fma(q, t, -0x1.000428p-2f);
  q = fma(q, t, 0x1.55555p-2f);
  q = fma(q, t, -0x1.fffff8p-2f);
  float r = fma(t * t, q, t);
  r = fma(e, kLn2Low, r);
  r = fma(e, kLn2, r);
  if (!(x > 0.0f))
    return x == 0.0f ? -std::numeric_limits<float>::infinity()
                     : std::numeric_limits<float>::quiet_NaN();
  return x == std::numeric_limits<float>::infinity() ? x : r;
}

LOCKSTEP_HD inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }
LOCKSTEP_HD inline float silu(float x) { return x * sigmoid(x); }

// The scale of a block with largest magnitude amax (NaN or infinity when the block holds one).
LOCKSTEP_HD inline float quant_scale(float amax, bool pow2) {
  if (!is_finite(amax)) return std::numeric_limits<float>::quiet_NaN();
  if (amax == 0.0f) return 1.0f;
  float s = amax / kE4m3Max;
  s = s < kScaleFloor ? kScaleFloor : s;
  if (pow2) {
    const std::uint32_t u = float_bits(s);
    s = bits_float((u & 0x7F800000u) + ((u & 0x007FFFFFu) != 0 ? 0x00800000u : 0u));
  }
  return s;
}

}  // namespace lockstep::numerics

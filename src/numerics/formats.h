// BF16, E4M3 and E5M2 codecs (docs/numerics.md, section 1). Branch-free on the hot paths so that
// loops over them vectorise.
#pragma once

#include <bit>
#include <cstdint>

#include "base/device_code.h"
#include "numerics/contract.h"

namespace lockstep::numerics {

// A BF16 value in memory. A type of its own, so that an integer never passes for a number.
struct Bf16 {
  std::uint16_t bits;
};
inline bool operator==(Bf16 a, Bf16 b) { return a.bits == b.bits; }

// An FP8 value in memory: the bits of an E4M3 or an E5M2 number; the tensor says which.
using Fp8 = std::uint8_t;

LOCKSTEP_HD inline std::uint32_t float_bits(float x) { return std::bit_cast<std::uint32_t>(x); }
LOCKSTEP_HD inline float bits_float(std::uint32_t x) { return std::bit_cast<float>(x); }

LOCKSTEP_HD inline bool is_nan(float x) { return (float_bits(x) & 0x7FFFFFFFu) > 0x7F800000u; }
LOCKSTEP_HD inline bool is_finite(float x) { return (float_bits(x) & 0x7F800000u) != 0x7F800000u; }

LOCKSTEP_HD inline float to_float(Bf16 x) {
  return bits_float(static_cast<std::uint32_t>(x.bits) << 16);
}

// Round to nearest even; NaN becomes 0x7FFF.
LOCKSTEP_HD inline Bf16 to_bf16(float x) {
  const std::uint32_t u = float_bits(x);
  const std::uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return {static_cast<std::uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FFFu : rounded)};
}

LOCKSTEP_HD inline float round_bf16(float x) { return to_float(to_bf16(x)); }

// Round to nearest even, saturate to +-448; NaN becomes 0x7F with the sign of x.
LOCKSTEP_HD inline Fp8 to_e4m3(float x) {
  const std::uint32_t u = float_bits(x);
  const std::uint32_t sign = (u >> 24) & 0x80u;
  const float magnitude = bits_float(u & 0x7FFFFFFFu);
  const float a = magnitude > kE4m3Max ? kE4m3Max : magnitude;
  const std::uint32_t b = float_bits(a);
  const std::uint32_t normal = ((b + 0x7FFFFu + ((b >> 20) & 1u)) >> 20) - (120u << 3);
  const std::uint32_t subnormal = float_bits(a + 16384.0f) - 0x46800000u;  // steps of 2^-9
  const std::uint32_t code = a < 0x1p-6f ? subnormal : normal;
  return static_cast<Fp8>(sign | ((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7Fu : code));
}

LOCKSTEP_HD inline float e4m3_to_float(Fp8 code) {
  const std::uint32_t magnitude = code & 0x7Fu;
  const float value = bits_float(magnitude << 20) * 0x1p120f;  // exact, subnormals too
  const std::uint32_t bits = magnitude == 0x7Fu ? 0x7FC00000u : float_bits(value);
  return bits_float(bits | (static_cast<std::uint32_t>(code & 0x80u) << 24));
}

// Round to nearest even, saturate to +-57344; NaN becomes 0x7F with the sign of x.
LOCKSTEP_HD inline Fp8 to_e5m2(float x) {
  const std::uint32_t u = float_bits(x);
  const std::uint32_t sign = (u >> 24) & 0x80u;
  const float magnitude = bits_float(u & 0x7FFFFFFFu);
  const float a = magnitude > kE5m2Max ? kE5m2Max : magnitude;
  const std::uint32_t b = float_bits(a);
  const std::uint32_t normal = ((b + 0xFFFFFu + ((b >> 21) & 1u)) >> 21) - (112u << 2);
  const std::uint32_t subnormal = float_bits(a + 128.0f) - 0x43000000u;  // steps of 2^-16
  const std::uint32_t code = a < 0x1p-14f ? subnormal : normal;
  return static_cast<Fp8>(sign | ((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7Fu : code));
}

LOCKSTEP_HD inline float e5m2_to_float(Fp8 code) {
  const std::uint32_t magnitude = code & 0x7Fu;
  const float value = bits_float(magnitude << 21) * 0x1p112f;
  std::uint32_t bits = float_bits(value);
  if (magnitude == 0x7Cu) bits = 0x7F800000u;
  if (magnitude > 0x7Cu) bits = 0x7FC00000u;
  return bits_float(bits | (static_cast<std::uint32_t>(code & 0x80u) << 24));
}

}  // namespace lockstep::numerics

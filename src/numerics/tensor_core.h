// One step of Hopper's tensor core with FP32 accumulation, as exact integer arithmetic
// (docs/numerics.md, section 4). This scalar text is the definition; ops/cpu holds fast versions
// with the same bits. Source: measured on an H100 and an H200 (tests/data/tensor_core); the same
// model as microsoft/MMA-Sim (arXiv 2511.10909).
#pragma once

#include <cstdint>

#include "numerics/math.h"

namespace lockstep::numerics {

// A finite number as sign * significand * 2^(exponent - fraction bits); subnormals keep the
// smallest exponent.
struct Term {
  std::int32_t significand;
  std::int32_t exponent;
  bool negative;
  bool finite;
};

inline Term e4m3_term(Fp8 code) {
  const int e = (code >> 3) & 15, m = code & 7;
  return {e == 0 ? m : m + 8, (e == 0 ? 1 : e) - 7, (code & 0x80) != 0, (code & 0x7F) != 0x7F};
}
inline Term e5m2_term(Fp8 code) {
  const int e = (code >> 2) & 31, m = code & 3;
  return {e == 0 ? m : m + 4, (e == 0 ? 1 : e) - 15, (code & 0x80) != 0, e != 31};
}
inline Term bf16_term(Bf16 x) {
  const int e = (x.bits >> 7) & 255, m = x.bits & 127;
  return {e == 0 ? m : m + 128, (e == 0 ? 1 : e) - 127, (x.bits & 0x8000) != 0, e != 255};
}
inline Term float_term(float x) {
  const std::uint32_t u = float_bits(x);
  const int e = (u >> 23) & 255;
  const std::int32_t m = static_cast<std::int32_t>(u & 0x7FFFFFu);
  return {e == 0 ? m : m + (1 << 23), (e == 0 ? 1 : e) - 127, (u >> 31) != 0, e != 255};
}

// Fraction bits of the product of two significands, alignment bits F and kept result bits R of a
// kind of step.
struct StepKind {
  int terms, product_fraction, alignment, result;
};
inline constexpr StepKind kE4m3Step{32, 6, 13, 13};
inline constexpr StepKind kE5m2E4m3Step{32, 5, 13, 13};  // one operand E5M2, the other E4M3
inline constexpr StepKind kE5m2Step{32, 4, 13, 13};
inline constexpr StepKind kBf16Step{16, 14, 25, 23};

// S * 2^(exponent) with its magnitude truncated to 1+result bits and to multiples of 2^-149.
inline float truncate_sum(std::int64_t sum, int exponent, int result) {
  if (sum == 0) return 0.0f;
  std::uint64_t magnitude =
      sum < 0 ? static_cast<std::uint64_t>(-sum) : static_cast<std::uint64_t>(sum);
  const int top = 63 - __builtin_clzll(magnitude);
  int drop = top - result;
  if (-149 - exponent > drop) drop = -149 - exponent;
  if (drop > 63) return 0.0f;
  if (drop > 0) magnitude = (magnitude >> drop) << drop;
  if (magnitude == 0) return 0.0f;  // +0, whatever the sign of the sum
  const double value = std::ldexp(static_cast<double>(magnitude), exponent);
  return static_cast<float>(sum < 0 ? -value : value);
}

// a, b: `kind.terms` decoded values each.
inline float tensor_core_step(const StepKind& kind, const Term* a, const Term* b, float c) {
  const Term tc = float_term(c);
  bool finite = tc.finite;
  int top = INT32_MIN;
  for (int i = 0; i < kind.terms; ++i) {
    finite = finite && a[i].finite && b[i].finite;
    if (a[i].significand != 0 && b[i].significand != 0) {
      const int x = a[i].exponent + b[i].exponent;
      top = x > top ? x : top;
    }
  }
  if (!finite) return std::numeric_limits<float>::quiet_NaN();
  if (tc.significand != 0 && tc.exponent > top) top = tc.exponent;
  if (top == INT32_MIN) return 0.0f;
  if (top < kLowestAlignment) top = kLowestAlignment;
  std::int64_t sum = 0;
  const auto add = [&](std::int64_t magnitude, int exponent, bool negative) {
    const int shift = top - exponent;
    const std::int64_t aligned = shift > 62 ? 0 : magnitude >> shift;
    sum += negative ? -aligned : aligned;
  };
  for (int i = 0; i < kind.terms; ++i) {
    const std::int64_t product = static_cast<std::int64_t>(a[i].significand) * b[i].significand;
    if (product == 0) continue;
    add(product << (kind.alignment - kind.product_fraction), a[i].exponent + b[i].exponent,
        a[i].negative != b[i].negative);
  }
  if (tc.significand != 0) {
    const int shift = kind.alignment - 23;  // may be negative
    const int distance = top - tc.exponent - shift;
    const std::int64_t magnitude = tc.significand;
    const std::int64_t aligned =
        distance >= 0 ? (distance > 62 ? 0 : magnitude >> distance) : magnitude << -distance;
    sum += tc.negative ? -aligned : aligned;
  }
  return truncate_sum(sum, top - kind.alignment, kind.result);
}

}  // namespace lockstep::numerics

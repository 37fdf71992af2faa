// The quantizer's inner loops: rows and column tiles of BF16 or FP32 values (docs/numerics.md,
// section 5). Magnitudes are compared as integers, so an infinity or a NaN is always the largest.
#pragma once

#include <cstdint>

#include "numerics/math.h"
#include "ops/cpu/isa.h"
#include "ops/quantize.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {

using numerics::Bf16;
using numerics::Fp8;

inline constexpr std::int64_t kTile = 32;  // columns that are quantized together

inline float quant_value(Bf16 x) { return numerics::to_float(x); }
inline float quant_value(float x) { return x; }

// Bits of |x| as FP32.
inline std::uint32_t magnitude(Bf16 x) {
  return static_cast<std::uint32_t>(x.bits & 0x7FFFu) << 16;
}
inline std::uint32_t magnitude(float x) { return numerics::float_bits(x) & 0x7FFFFFFFu; }

inline std::uint32_t row_amax(const Bf16* x, std::int64_t n) {
  std::uint16_t m = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint16_t v = x[i].bits & 0x7FFFu;
    m = v > m ? v : m;
  }
  return static_cast<std::uint32_t>(m) << 16;
}
inline std::uint32_t row_amax(const float* x, std::int64_t n) {
  std::uint32_t m = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint32_t v = magnitude(x[i]);
    m = v > m ? v : m;
  }
  return m;
}

// A block with a NaN or an infinity has a NaN scale and codes 0x7F.
inline float block_scale(std::uint32_t amax, bool pow2) {
  return numerics::quant_scale(numerics::bits_float(amax), pow2);
}

inline Fp8 quant_code(float x, float inv) {
  return numerics::is_nan(inv) ? Fp8{0x7F} : numerics::to_e4m3(x * inv);
}

inline void count_block(std::uint32_t amax, QuantStats& stats) {
  ++stats.blocks;
  const float a = numerics::bits_float(amax);
  if (amax == 0) {
    ++stats.zero_blocks;
  } else if (!numerics::is_finite(a)) {
    ++stats.nonfinite_blocks;
  } else {
    stats.amax_min = stats.amax_min == 0.0f || a < stats.amax_min ? a : stats.amax_min;
    stats.amax_max = a > stats.amax_max ? a : stats.amax_max;
  }
}

// Codes of n neighbouring values under one scale; stats may be null.
template <typename Source>
inline void encode_row(const Source* x, std::int64_t n, float inv, Fp8* codes, QuantStats* stats) {
  if (numerics::is_nan(inv)) {
    for (std::int64_t i = 0; i < n; ++i) codes[i] = 0x7F;
  } else {
    for (std::int64_t i = 0; i < n; ++i) codes[i] = numerics::to_e4m3(quant_value(x[i]) * inv);
  }
  if (stats == nullptr) return;
  std::int32_t saturated = 0, flushed = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const float y = quant_value(x[i]) * inv;
    saturated += (y > 464.0f) | (y < -464.0f);
    flushed += (magnitude(x[i]) != 0) & ((codes[i] & 0x7Fu) == 0);
  }
  stats->values += n;
  stats->saturated += saturated;
  stats->flushed_to_zero += flushed;
}

// amax[c] becomes the largest magnitude of column c and of what it held.
template <typename Source>
inline void column_amax(const Source* x, std::int64_t stride, std::int64_t rows, std::int64_t n,
                        std::uint32_t* amax) {
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < n; ++c) {
      const std::uint32_t v = magnitude(x[r * stride + c]);
      amax[c] = v > amax[c] ? v : amax[c];
    }
}

// Codes of `rows` <= 128 rows and n <= kTile columns, written transposed: column c goes to
// out[c * out_stride ...].
template <typename Source>
inline void encode_columns(const Source* x, std::int64_t stride, std::int64_t rows, std::int64_t n,
                           const float* inv, Fp8* out, std::int64_t out_stride, QuantStats* stats) {
  Fp8 tile[numerics::kQuantBlock * kTile];
  std::int32_t saturated = 0, flushed = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    const Source* row = x + r * stride;
    Fp8* codes = tile + r * kTile;
    for (std::int64_t c = 0; c < n; ++c) codes[c] = quant_code(quant_value(row[c]), inv[c]);
    if (stats == nullptr) continue;
    for (std::int64_t c = 0; c < n; ++c) {
      const float y = quant_value(row[c]) * inv[c];
      saturated += (y > 464.0f) | (y < -464.0f);
      flushed += (magnitude(row[c]) != 0) & ((codes[c] & 0x7Fu) == 0);
    }
  }
  for (std::int64_t c = 0; c < n; ++c)
    for (std::int64_t r = 0; r < rows; ++r) out[c * out_stride + r] = tile[r * kTile + c];
  if (stats == nullptr) return;
  stats->values += rows * n;
  stats->saturated += saturated;
  stats->flushed_to_zero += flushed;
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA

#include "model/stored_weight.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "base/error.h"

namespace lockstep::model {

using base::fail;
using base::InputError;
using numerics::Bf16;
using numerics::Fp8;

static constexpr std::int64_t kScaleBlock = 128;
static constexpr Fp8 kNanCode = 0x7F;  // and 0xFF

namespace {

template <typename T>
T load(const std::byte* at) {  // files promise no alignment
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

float half_to_float(std::uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  const float magnitude = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                          : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                           : std::ldexp(1024.0f + mantissa, exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}

// Where row `row` of the matrix begins in the file.
const std::byte* row_at(const StoredMatrix& m, std::int64_t row) {
  if (m.interleaved != 0) {
    const std::int64_t half = m.interleaved / 2, within = row % m.interleaved;
    row = row - within + (within < half ? 2 * within : 2 * (within - half) + 1);
  }
  return m.data + row * m.row_bytes;
}

void read_row_q4_1(const std::byte* at, std::int64_t columns, Bf16* to) {
  for (std::int64_t k = 0; k < columns; k += kGgufBlock, at += 20) {
    const float d = half_to_float(load<std::uint16_t>(at));
    const float m = half_to_float(load<std::uint16_t>(at + 2));
    for (int i = 0; i < 16; ++i) {
      const auto pair = std::to_integer<unsigned>(at[4 + i]);
      to[k + i] = numerics::to_bf16(d * static_cast<float>(pair & 15) + m);
      to[k + i + 16] = numerics::to_bf16(d * static_cast<float>(pair >> 4) + m);
    }
  }
}

void read_row_q8_0(const std::byte* at, std::int64_t columns, Bf16* to) {
  for (std::int64_t k = 0; k < columns; k += kGgufBlock, at += 34) {
    const float d = half_to_float(load<std::uint16_t>(at));
    for (int i = 0; i < 32; ++i)
      to[k + i] = numerics::to_bf16(d * static_cast<float>(load<std::int8_t>(at + 2 + i)));
  }
}

float scale_value(const StoredMatrix& m, std::int64_t row, std::int64_t column) {
  const std::byte* at = m.data + row * m.row_bytes + column * m.column_bytes;
  switch (m.type) {
    case StoredType::kF32:
      return load<float>(at);
    case StoredType::kBf16:
      return numerics::to_float(load<Bf16>(at));
    case StoredType::kE8m0: {
      const auto exponent = std::to_integer<int>(*at);
      return exponent == 255 ? NAN : std::ldexp(1.0f, exponent - 127);
    }
    default:
      fail<base::ContractError>("scales of type {}", static_cast<int>(m.type));
  }
}

float checked_scale(const StoredWeight& w, std::int64_t row, std::int64_t column) {
  const float scale = scale_value(w.scales, row, column);
  if (!(scale > 0 && scale <= 0x1.fffffep127f))
    fail<InputError>(
        "{}: tensor '{}': the scale of block [{}, {}] is {}, it must be positive and finite",
        w.file, w.name, row, column, scale);
  return scale;
}

void read_row_fp8(const StoredWeight& w, std::int64_t row, Bf16* to) {
  const std::byte* at = row_at(w.values, row);
  float scale = 0;
  for (std::int64_t k = 0; k < w.values.columns; ++k) {
    if (k % kScaleBlock == 0) scale = checked_scale(w, row / kScaleBlock, k / kScaleBlock);
    to[k] = numerics::to_bf16(numerics::e4m3_to_float(load<Fp8>(at)) * scale);
    at += w.values.column_bytes;
  }
}

void read_row(const StoredWeight& w, std::int64_t row, Bf16* to) {
  const StoredMatrix& m = w.values;
  const std::byte* at = row_at(m, row);
  switch (m.type) {
    case StoredType::kBf16:
      if (m.column_bytes == 2) {
        std::memcpy(to, at, static_cast<std::size_t>(m.columns) * 2);
      } else {
        for (std::int64_t k = 0; k < m.columns; ++k) to[k] = load<Bf16>(at + k * m.column_bytes);
      }
      return;
    case StoredType::kF16:
      for (std::int64_t k = 0; k < m.columns; ++k)
        to[k] = numerics::to_bf16(half_to_float(load<std::uint16_t>(at + k * m.column_bytes)));
      return;
    case StoredType::kF32:
      for (std::int64_t k = 0; k < m.columns; ++k)
        to[k] = numerics::to_bf16(load<float>(at + k * m.column_bytes));
      return;
    case StoredType::kE4m3:
      return read_row_fp8(w, row, to);
    case StoredType::kQ4_1:
      return read_row_q4_1(at, m.columns, to);
    case StoredType::kQ8_0:
      return read_row_q8_0(at, m.columns, to);
    case StoredType::kE8m0:
      break;
  }
  fail<base::ContractError>("weights of type {}", static_cast<int>(m.type));
}

}  // namespace

std::int64_t stored_bytes(StoredType type, std::int64_t columns) {
  switch (type) {
    case StoredType::kBf16:
    case StoredType::kF16:
      return columns * 2;
    case StoredType::kF32:
      return columns * 4;
    case StoredType::kE4m3:
    case StoredType::kE8m0:
      return columns;
    case StoredType::kQ4_1:
      return columns / kGgufBlock * 20;
    case StoredType::kQ8_0:
      return columns / kGgufBlock * 34;
  }
  fail<base::ContractError>("no stored type {}", static_cast<int>(type));
}

void read_rows(const StoredWeight& w, std::int64_t begin, std::int64_t count, Bf16* to,
               std::int64_t stride) {
  for (std::int64_t row = begin; row < begin + count; ++row, to += stride) {
    read_row(w, row, to);
    for (std::int64_t k = 0; k < w.values.columns; ++k)
      if ((to[k].bits & 0x7F80) == 0x7F80)
        fail<InputError>("{}: tensor '{}' holds {} at [{}, {}]", w.file, w.name,
                         numerics::to_float(to[k]), row, k);
  }
}

void read_vector(const StoredWeight& w, float* to) {
  for (std::int64_t k = 0; k < w.values.columns; ++k) {
    const std::byte* at = w.values.data + k * w.values.column_bytes;
    switch (w.values.type) {
      case StoredType::kF32:
        to[k] = load<float>(at);
        break;
      case StoredType::kBf16:
        to[k] = numerics::to_float(load<Bf16>(at));
        break;
      case StoredType::kF16:
        to[k] = half_to_float(load<std::uint16_t>(at));
        break;
      default:
        fail<InputError>("{}: tensor '{}' must be F32, BF16 or F16", w.file, w.name);
    }
    if (!numerics::is_finite(to[k]))
      fail<InputError>("{}: tensor '{}' holds {} at [{}]", w.file, w.name, to[k], k);
  }
}

void read_codes(const StoredWeight& w, std::int64_t begin, std::int64_t count, Fp8* to,
                std::int64_t stride) {
  LOCKSTEP_CHECK(w.fp8(), "tensor '{}' has no codes", w.name);
  const StoredMatrix& m = w.values;
  for (std::int64_t row = begin; row < begin + count; ++row, to += stride) {
    const std::byte* at = row_at(m, row);
    for (std::int64_t k = 0; k < m.columns; ++k) {
      to[k] = load<Fp8>(at + k * m.column_bytes);
      if ((to[k] & kNanCode) == kNanCode)
        fail<InputError>("{}: tensor '{}' holds a NaN code at [{}, {}]", w.file, w.name, row, k);
    }
  }
}

void read_scales(const StoredWeight& w, float* to) {
  LOCKSTEP_CHECK(w.fp8(), "tensor '{}' has no scales", w.name);
  for (std::int64_t row = 0; row < w.scales.rows; ++row)
    for (std::int64_t column = 0; column < w.scales.columns; ++column)
      *to++ = checked_scale(w, row, column);
}

}  // namespace lockstep::model

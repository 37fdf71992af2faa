// Random operands for the GPU's GEMM tests.
#pragma once

#include "gpu/gpu_test.h"

namespace lockstep::ops::test {

// Random bits of sign and significand, exponents in a range of +-`spread` powers of two around 1,
// one value in ten a zero. Cheap to draw.
inline Tensor spread_values(Rng& rng, DType dtype, const Shape& shape, int spread = 6) {
  Tensor out = empty(dtype, shape);
  for (std::int64_t i = 0; i < shape.count(); ++i) {
    const std::uint64_t r = rng();
    const auto exponent =
        static_cast<std::uint32_t>(127 + static_cast<int>((r >> 32) % (2 * spread + 1)) - spread);
    const std::uint32_t bits = static_cast<std::uint32_t>(r & 0x807FFFFFu) | exponent << 23;
    set_value(out.view(), i, (r >> 60) == 0 ? 0.0 : numerics::bits_float(bits));
  }
  return out;
}

// Positive FP32 scales.
inline Tensor spread_scales(Rng& rng, const Shape& shape) {
  Tensor out = empty(DType::kFp32, shape);
  for (std::int64_t i = 0; i < shape.count(); ++i) {
    const auto r = static_cast<std::uint32_t>(rng());
    out.as<float>()[i] = numerics::bits_float((r & 0x007FFFFFu) | (117u + (r >> 24) % 12u) << 23);
  }
  return out;
}

inline std::vector<std::int32_t> padded_to_128(const std::vector<std::int32_t>& offsets) {
  std::vector<std::int32_t> out{0};
  for (std::size_t e = 0; e + 1 < offsets.size(); ++e)
    out.push_back(out.back() + (offsets[e + 1] - offsets[e] + 127) / 128 * 128);
  return out;
}

inline std::string text_of(const std::vector<std::int32_t>& offsets) {
  std::string out = "offsets";
  for (const std::int32_t o : offsets) out += " " + std::to_string(o);
  return out;
}

}  // namespace lockstep::ops::test

// The codecs against a search for the nearest value in double precision, written from the
// definition of the formats.
#include "numerics/formats.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace lockstep::numerics {
namespace {

struct Fp8Format {
  int mantissa_bits, bias;
  int largest;  // code of the largest finite value
};
constexpr Fp8Format kE4m3{3, 7, 0x7E}, kE5m2{2, 15, 0x7B};

double value_of(const Fp8Format& f, int code) {
  const int field = (code & 0x7F) >> f.mantissa_bits, m = code & ((1 << f.mantissa_bits) - 1);
  const double significand = field == 0 ? m : m + (1 << f.mantissa_bits);
  const double magnitude =
      std::ldexp(significand, (field == 0 ? 1 : field) - f.bias - f.mantissa_bits);
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}

// The code nearest to x, ties to the even code, beyond the largest value the largest value.
int nearest(const Fp8Format& f, double x) {
  const double magnitude = std::abs(x);
  int best = 0;
  for (int code = 1; code <= f.largest; ++code) {
    const double d = std::abs(value_of(f, code) - magnitude),
                 e = std::abs(value_of(f, best) - magnitude);
    if (d < e || (d == e && code % 2 == 0)) best = code;
  }
  return best | (std::signbit(x) ? 0x80 : 0);
}

TEST(Formats, DecodeAllCodes) {
  for (int code = 0; code < 256; ++code) {
    const float e4m3 = e4m3_to_float(static_cast<Fp8>(code)),
                e5m2 = e5m2_to_float(static_cast<Fp8>(code));
    EXPECT_EQ(std::signbit(e4m3), code >= 128);
    EXPECT_EQ(std::signbit(e5m2), code >= 128);
    if ((code & 0x7F) == 0x7F)
      EXPECT_TRUE(std::isnan(e4m3)) << code;
    else
      EXPECT_EQ(e4m3, value_of(kE4m3, code)) << code;
    if ((code & 0x7F) > 0x7C)
      EXPECT_TRUE(std::isnan(e5m2)) << code;
    else if ((code & 0x7F) == 0x7C)
      EXPECT_TRUE(std::isinf(e5m2)) << code;
    else
      EXPECT_EQ(e5m2, value_of(kE5m2, code)) << code;
  }
}

TEST(Formats, RoundTripAllCodes) {
  for (int code = 0; code < 256; ++code) {
    const Fp8 c = static_cast<Fp8>(code);
    if ((code & 0x7F) <= kE4m3.largest) {
      EXPECT_EQ(to_e4m3(e4m3_to_float(c)), c);
    }
    if ((code & 0x7F) <= kE5m2.largest) {
      EXPECT_EQ(to_e5m2(e5m2_to_float(c)), c);
    }
  }
}

TEST(Formats, EncodeAllBf16) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const float x = to_float({static_cast<std::uint16_t>(bits)});
    const int sign = bits >= 0x8000 ? 0x80 : 0;
    const Fp8 e4m3 = to_e4m3(x), e5m2 = to_e5m2(x);
    if (std::isnan(x)) {
      ASSERT_EQ(e4m3, sign | 0x7F);
      ASSERT_EQ(e5m2, sign | 0x7F);
    } else if (std::abs(x) > 1e6f) {  // infinity too
      ASSERT_EQ(e4m3, sign | kE4m3.largest);
      ASSERT_EQ(e5m2, sign | kE5m2.largest);
    } else if (std::abs(x) < 1e-7f) {
      ASSERT_EQ(e4m3, sign);
      ASSERT_EQ(e5m2, sign);
    } else {
      ASSERT_EQ(e4m3, nearest(kE4m3, x)) << x;
      ASSERT_EQ(e5m2, nearest(kE5m2, x)) << x;
    }
  }
}

// Halfway points between neighbouring codes and the FP32 numbers beside them.
TEST(Formats, EncodeTiesOfFp32) {
  for (const auto& [format, convert] : {std::pair{kE4m3, &to_e4m3}, std::pair{kE5m2, &to_e5m2}})
    for (int code = 0; code < format.largest; ++code) {
      const float tie =
          static_cast<float>((value_of(format, code) + value_of(format, code + 1)) / 2);
      for (const float x : {tie, std::nextafter(tie, 0.0f), std::nextafter(tie, 1e9f)}) {
        EXPECT_EQ(convert(x), nearest(format, x)) << code;
        EXPECT_EQ(convert(-x), nearest(format, -x)) << code;
      }
    }
}

TEST(Formats, Bf16RoundsToNearestEven) {
  std::mt19937 rng(1);
  const auto check = [](std::uint32_t bits) {
    const float x = bits_float(bits);
    if (std::isnan(x)) {
      ASSERT_EQ(to_bf16(x).bits, 0x7FFF);
      return;
    }
    // The neighbours of x by magnitude; one past the largest is infinity, which stands at 2^128.
    const std::uint32_t down = (bits & 0x7FFFFFFFu) >> 16, sign = bits >> 31 << 15;
    if (std::isinf(x)) {
      ASSERT_EQ(to_bf16(x).bits, sign | down);
      return;
    }
    const auto place = [](std::uint32_t m) {
      return m == 0x7F80 ? std::ldexp(1.0, 128) : double{bits_float(m << 16)};
    };
    const double below = std::abs(double{x}) - place(down),
                 above = place(down + 1) - std::abs(double{x});
    const bool up = above < below || (above == below && down % 2 == 1);
    ASSERT_EQ(to_bf16(x).bits, sign | (up ? down + 1 : down)) << x;
  };
  for (int i = 0; i < 200000; ++i) check(static_cast<std::uint32_t>(rng()));
  for (std::uint32_t high = 0; high < 65536; ++high)
    for (const std::uint32_t low : {0x0000u, 0x0001u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu})
      check(high << 16 | low);
}

}  // namespace
}  // namespace lockstep::numerics

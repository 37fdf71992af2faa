// The errors that numerics/math.h claims, measured against double precision over a dense walk of
// the range, and the exact values and edges that docs/numerics.md, sections 2 and 5, name.
#include "numerics/math.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace lockstep::numerics {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
const float kNan = std::numeric_limits<float>::quiet_NaN();

// Largest relative error of f on [low, high], every `stride`-th FP32 number; results below the
// smallest normal number are held to half a unit of 2^-149 more.
template <typename F, typename G>
double worst(F f, G exact, float low, float high, std::uint32_t stride) {
  double error = 0;
  const auto visit = [&](float x) {
    const double e = exact(double{x}), y = double{f(x)};
    const double slack = std::abs(e) < 0x1p-126 ? 0x1p-150 : 0.0;
    const double d = std::max(0.0, std::abs(y - e) - slack) / std::abs(e);
    error = !(d <= error) ? d : error;
  };
  const std::uint32_t from = low < 0 ? float_bits(-low) : 0;
  if (low < 0)
    for (std::uint32_t u = 0x30000000u; u <= from; u += stride) visit(-bits_float(u));
  if (high > 0) {
    const std::uint32_t begin = low > 0 ? float_bits(low) : 0x30000000u;
    for (std::uint32_t u = begin; u <= float_bits(high); u += stride) visit(bits_float(u));
  }
  return error;
}

TEST(Math, Exp2) {
  EXPECT_LE(worst([](float x) { return exp2(x); }, [](double x) { return std::exp2(x); }, -149.4f,
                  127.99f, 997),
            std::exp2(-22.5));
  for (int n = -149; n <= 127; ++n)
    EXPECT_EQ(exp2(static_cast<float>(n)), std::ldexp(1.0f, n)) << n;
  EXPECT_EQ(exp2(-149.6f), 0x1p-149f);
  EXPECT_EQ(exp2(-150.0f), 0.0f);
  EXPECT_EQ(exp2(-kInf), 0.0f);
  EXPECT_EQ(exp2(128.0f), kInf);
  EXPECT_EQ(exp2(kInf), kInf);
  EXPECT_TRUE(is_nan(exp2(kNan)));
}

TEST(Math, Exp2NonpositiveHasTheBitsOfExp2) {
  const auto check = [](float x) {
    ASSERT_EQ(float_bits(exp2_nonpositive(x)), float_bits(exp2(x))) << x;
  };
  check(0.0f);
  check(-0.0f);
  for (std::uint32_t u = float_bits(0x1p-60f); u <= float_bits(190.0f); u += 211)
    check(-bits_float(u));
  for (float x = -151.0f; x <= -124.0f; x += 0x1p-11f) check(x);  // into and out of the subnormals
}

TEST(Math, Exp) {
  EXPECT_LE(worst([](float x) { return exp(x); }, [](double x) { return std::exp(x); }, -103.0f,
                  88.7f, 997),
            std::exp2(-22.5));
  EXPECT_EQ(exp(0.0f), 1.0f);
  EXPECT_EQ(exp(-kInf), 0.0f);
  EXPECT_EQ(exp(kInf), kInf);
  EXPECT_TRUE(is_nan(exp(kNan)));
}

TEST(Math, Exp2Softmax) {
  EXPECT_LE(worst([](float x) { return exp2_softmax(x); }, [](double x) { return std::exp2(x); },
                  -126.0f, 0.5f, 499),
            1.02e-4);
  EXPECT_EQ(float_bits(exp2_softmax(0.0f)), float_bits(1.0f));
  EXPECT_EQ(float_bits(exp2_softmax(-kInf)), 0u);
  EXPECT_EQ(float_bits(exp2_softmax(-127.0f)), 0u);
  EXPECT_EQ(float_bits(exp2_softmax(-1e30f)), 0u);
}

TEST(Math, Log) {
  EXPECT_LE(worst([](float x) { return log(x); }, [](double x) { return std::log(x); }, 0x1p-149f,
                  0x1.fffffep127f, 1999),
            std::exp2(-22.0));
  EXPECT_LE(
      worst([](float x) { return log(x); }, [](double x) { return std::log(x); }, 0.7f, 1.5f, 13),
      std::exp2(-22.0));
  EXPECT_EQ(log(1.0f), 0.0f);
  EXPECT_EQ(log(0.0f), -kInf);
  EXPECT_EQ(log(kInf), kInf);
  EXPECT_TRUE(is_nan(log(-1.0f)));
  EXPECT_TRUE(is_nan(log(kNan)));
}

// 1 + e and its reciprocal each round once: relative error of e^-x, at most halved, plus two half
// units.
TEST(Math, Sigmoid) {
  const auto exact = [](double x) { return 1.0 / (1.0 + std::exp(-x)); };
  EXPECT_LE(worst([](float x) { return sigmoid(x); }, exact, -86.0f, 100.0f, 997),
            std::exp2(-22.5) + 2 * 0x1p-24 + 0x1p-40);
  EXPECT_EQ(sigmoid(0.0f), 0.5f);
  EXPECT_EQ(sigmoid(kInf), 1.0f);
  EXPECT_EQ(sigmoid(-kInf), 0.0f);
  EXPECT_EQ(silu(0.0f), 0.0f);
}

TEST(Math, QuantScale) {
  EXPECT_EQ(quant_scale(448.0f, false), 1.0f);
  EXPECT_EQ(quant_scale(448.0f, true), 1.0f);
  EXPECT_EQ(quant_scale(449.0f, true), 2.0f);
  EXPECT_EQ(quant_scale(3.0f, false), 3.0f / 448.0f);
  EXPECT_EQ(quant_scale(3.0f, true), 0x1p-7f);  // 3 / 448 = 2^-7.2
  EXPECT_EQ(quant_scale(0.0f, false), 1.0f);
  EXPECT_EQ(quant_scale(0.0f, true), 1.0f);
  EXPECT_EQ(quant_scale(0x1p-149f, false), kScaleFloor);
  EXPECT_EQ(quant_scale(0x1p-100f, true), kScaleFloor);
  EXPECT_TRUE(is_nan(quant_scale(kInf, false)));
  EXPECT_TRUE(is_nan(quant_scale(kNan, true)));
  // The largest value lands on 448, or below it with powers of two, for every mantissa.
  for (std::uint32_t m = 0; m < (1u << 23); m += 1021)
    for (const std::uint32_t e : {40u, 127u, 200u}) {
      const float amax = bits_float(e << 23 | m);
      const float s = quant_scale(amax, false), p = quant_scale(amax, true);
      EXPECT_EQ(to_e4m3(amax * (1.0f / s)), 0x7E);
      EXPECT_EQ(float_bits(p) & 0x007FFFFFu, 0u);
      EXPECT_GE(p, s);
      EXPECT_LT(p, 2 * s);
    }
}

}  // namespace
}  // namespace lockstep::numerics

#include "ops/swiglu.h"

#include <gtest/gtest.h>

#include "elementwise_util.h"
#include "numerics/math.h"
#include "ops/reference/quantize.h"
#include "ops/reference/swiglu.h"

namespace lockstep::ops::test {
namespace {

using numerics::Bf16;
using numerics::to_float;

// exp is good to 2^-22.5; the sum, the quotient and two products add half a step of FP32 each.
constexpr double kRelative = 0x1.8p-23 + 4 * 0x1p-24;

float product(const Tensor& gate_up, std::int64_t m, std::int64_t f, std::int64_t F) {
  const Bf16* row = gate_up.as<Bf16>() + m * 2 * F;
  return numerics::silu(to_float(row[f])) * to_float(row[F + f]);
}

TEST(Swiglu, AgainstTheReferenceAndOnAllContexts) {
  Rng rng(1);
  for (const std::int64_t M : {0, 1, 7})
    for (const std::int64_t F : {1, 31, 128, 130}) {
      const Tensor gate_up = random_normal(rng, DType::kBf16, {M, 2 * F}, 4.0);
      const Tensor d_a = random_normal(rng, DType::kBf16, {M, F});
      const Values want = reference::swiglu(values(gate_up), F);
      const Values want_d = reference::swiglu_backward(values(gate_up), values(d_a), F);
      on_all_contexts([&](const Context& ctx) {
        const Poisoned a(DType::kBf16, {M, F}), d(DType::kBf16, {M, 2 * F});
        swiglu(ctx, gate_up, a);
        swiglu_backward(ctx, gate_up, d_a, d);
        EXPECT_TRUE(a.guards_intact() && d.guards_intact() && a.all_written() && d.all_written());
        for (std::int64_t i = 0; i < M * F; ++i) {
          const double v = want[index(i)];
          EXPECT_LE(std::fabs(get_value(a, i) - v), bf16_rounding(v) + kRelative * std::fabs(v));
          EXPECT_EQ(a.view().as<Bf16>()[i], numerics::to_bf16(product(gate_up, i / F, i % F, F)));
        }
        for (std::int64_t m = 0; m < M; ++m)
          for (std::int64_t f = 0; f < F; ++f) {
            const std::int64_t i = m * 2 * F + f;
            const float g = to_float(gate_up.as<Bf16>()[i]);
            const float u = to_float(gate_up.as<Bf16>()[i + F]);
            const float da = to_float(d_a.as<Bf16>()[m * F + f]), sg = numerics::sigmoid(g);
            EXPECT_EQ(d.view().as<Bf16>()[i],
                      numerics::to_bf16(((da * u) * sg) * std::fma(g, 1 - sg, 1.0f)));
            EXPECT_EQ(d.view().as<Bf16>()[i + F], numerics::to_bf16(da * (g * sg)));
            // sg (1 + g (1 - sg)) cancels near its zero at g = -1.28: the bound takes the terms.
            const double terms = std::fabs(da * u * sg) * (1.0 + std::fabs(g) * (1.0 + sg));
            EXPECT_LE(std::fabs(get_value(d, i) - want_d[index(i)]),
                      bf16_rounding(want_d[index(i)]) + 2 * kRelative * terms);
            EXPECT_LE(
                std::fabs(get_value(d, i + F) - want_d[index(i + F)]),
                bf16_rounding(want_d[index(i + F)]) + kRelative * std::fabs(want_d[index(i + F)]));
          }
      });
    }
}

// BF16 hides most differences of an FP32 order, so the order is checked on half a million values.
TEST(Swiglu, OrderOfTheProducts) {
  Rng rng(4);
  const std::int64_t M = 64, F = 8192;
  const Tensor gate_up = random_normal(rng, DType::kBf16, {M, 2 * F}, 2.0);
  const Tensor d_a = random_normal(rng, DType::kBf16, {M, F});
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const Tensor a = empty(DType::kBf16, {M, F}), d = empty(DType::kBf16, {M, 2 * F});
  swiglu(ctx, gate_up, a);
  swiglu_backward(ctx, gate_up, d_a, d);
  std::int64_t forward = 0, gate = 0, up = 0;
  for (std::int64_t m = 0; m < M; ++m)
    for (std::int64_t f = 0; f < F; ++f) {
      const std::int64_t i = m * 2 * F + f;
      const float g = to_float(gate_up.as<Bf16>()[i]), u = to_float(gate_up.as<Bf16>()[i + F]);
      const float da = to_float(d_a.as<Bf16>()[m * F + f]), sg = numerics::sigmoid(g);
      forward += a.as<Bf16>()[m * F + f] == numerics::to_bf16((g * sg) * u) ? 0 : 1;
      gate +=
          d.as<Bf16>()[i] == numerics::to_bf16(((da * u) * sg) * std::fma(g, 1 - sg, 1.0f)) ? 0 : 1;
      up += d.as<Bf16>()[i + F] == numerics::to_bf16(da * (g * sg)) ? 0 : 1;
    }
  EXPECT_EQ(forward, 0);
  EXPECT_EQ(gate, 0);
  EXPECT_EQ(up, 0);
}

TEST(Swiglu, EveryGateIsFiniteAndGoesToItsLimits) {
  const std::int64_t F = 65536;
  const Tensor gate_up = empty(DType::kBf16, {1, 2 * F}), d_a = empty(DType::kBf16, {1, F});
  for (std::int64_t f = 0; f < F; ++f) {
    const bool finite = (f & 0x7F80) != 0x7F80;
    gate_up.as<Bf16>()[f].bits = static_cast<std::uint16_t>(finite ? f : 0);
    set_value(gate_up, F + f, 1.0);
    set_value(d_a, f, 1.0);
  }
  const Values want = reference::swiglu(values(gate_up), F);
  on_all_contexts([&](const Context& ctx) {
    const Poisoned a(DType::kBf16, {1, F}), d(DType::kBf16, {1, 2 * F});
    swiglu(ctx, gate_up, a);
    swiglu_backward(ctx, gate_up, d_a, d);
    for (std::int64_t f = 0; f < F; ++f) {
      const double v = want[index(f)];
      // Below -87 the sigmoid is subnormal or, where exp is infinite, 0: |g| e^g is below 2^-119.
      const double tail = get_value(gate_up, f) < -87 ? 0x1p-119 : 0.0;
      EXPECT_LE(std::fabs(get_value(a, f) - v), bf16_rounding(v) + kRelative * std::fabs(v) + tail);
      EXPECT_TRUE(std::isfinite(get_value(d, f)) && std::isfinite(get_value(d, F + f))) << f;
    }
  });
}

TEST(Swiglu, ReferenceBackwardAgainstDifferences) {
  Rng rng(2);
  const Values gate_up = random_values(rng, 3 * 10), c = random_values(rng, 3 * 5);
  expect_near_differences(
      reference::swiglu_backward(gate_up, c, 5),
      differences([](const Values& at) { return reference::swiglu(at, 5); }, c, gate_up));
}

// Codes and scales of the FP32 products, from the definition.
TEST(Swiglu, QuantizeFollowsTheContract) {
  Rng rng(3);
  const std::vector<std::int32_t> offsets{0, 130, 130, 137}, padded{0, 256, 256, 384};
  const Tensor offsets_E1 = int32_tensor(offsets), padded_E1 = int32_tensor(padded);
  const Segments segments{offsets_E1, padded_E1};
  const std::int64_t M = 137, F = 200, R = 384, G = 2, E = 3;
  const Tensor gate_up = random_normal(rng, DType::kBf16, {M, 2 * F}, 2.0);
  const auto amax_of = [&](std::int64_t m0, std::int64_t m1, std::int64_t f0, std::int64_t f1) {
    float amax = 0;
    for (std::int64_t m = m0; m < m1; ++m)
      for (std::int64_t f = f0; f < f1; ++f)
        amax = std::max(amax, std::fabs(product(gate_up, m, f, F)));
    return amax;
  };
  for (const bool pow2 : {false, true})
    for (const Scaling scaling : {Scaling::kBlock, Scaling::kRow})
      on_all_contexts([&](const Context& ctx) {
        const bool blocks = scaling == Scaling::kBlock;
        const Poisoned codes(DType::kE4m3, {M, F}), codes_t(DType::kE4m3, {F, R});
        const Poisoned scales(DType::kFp32, blocks ? Shape{G, M} : Shape{M});
        const Poisoned scales_t(DType::kFp32, {blocks ? R / 128 : E, F});
        const Fp8Columns columns{codes_t, scales_t, scaling};
        QuantStats stats;
        swiglu_quantize(ctx, gate_up, segments, pow2, {codes, scales, scaling}, &columns, &stats);
        EXPECT_TRUE(codes.guards_intact() && codes_t.guards_intact() && scales.guards_intact() &&
                    scales_t.guards_intact());
        EXPECT_EQ(stats.values, M * F);
        EXPECT_EQ(stats.blocks, blocks ? M * G : M);
        std::int64_t different = 0;
        for (std::int64_t m = 0; m < M; ++m)
          for (std::int64_t f = 0; f < F; ++f) {
            const std::int64_t f0 = blocks ? f / 128 * 128 : 0;
            const std::int64_t f1 = blocks ? std::min(F, f0 + 128) : F;
            float s = scales.view().as<float>()[blocks ? f / 128 * M + m : m];
            if (f == f0) {
              EXPECT_EQ(s, numerics::quant_scale(amax_of(m, m + 1, f0, f1), pow2));
            }
            const float a = product(gate_up, m, f, F);
            different += codes.view().fp8()[m * F + f] != numerics::to_e4m3(a * (1.0f / s));
            const std::int64_t e = m < 130 ? 0 : 2, r = padded[index(e)] + m - offsets[index(e)];
            const std::int64_t m0 = blocks && m < 130 ? m / 128 * 128 : offsets[index(e)];
            const std::int64_t m1 = blocks ? std::min<std::int64_t>(offsets[index(e + 1)], m0 + 128)
                                           : offsets[index(e + 1)];
            s = scales_t.view().as<float>()[(blocks ? r / 128 : e) * F + f];
            if (m == m0) {
              EXPECT_EQ(s, numerics::quant_scale(amax_of(m0, m1, f, f + 1), pow2));
            }
            different += codes_t.view().fp8()[f * R + r] != numerics::to_e4m3(a * (1.0f / s));
          }
        EXPECT_EQ(different, 0);
        for (std::int64_t f = 0; f < F; ++f)
          for (std::int64_t r = 0; r < R; ++r)
            if ((r >= 130 && r < 256) || r >= 263) {
              EXPECT_EQ(codes_t.view().fp8()[f * R + r], 0);
            }
        // Row codes alone are the same.
        const Poisoned alone(DType::kE4m3, {M, F});
        swiglu_quantize(ctx, gate_up, {}, pow2, {alone, scales, scaling}, nullptr, nullptr);
        EXPECT_TRUE(bytes_equal(alone, codes));
      });
}

}  // namespace
}  // namespace lockstep::ops::test

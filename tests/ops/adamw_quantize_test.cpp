#include "ops/adamw_quantize.h"

#include <gtest/gtest.h>

#include "elementwise_util.h"

namespace lockstep::ops::test {
namespace {

struct Outputs {
  Tensor master, m, v;
  Poisoned w, codes, scales, codes_t, scales_t;
  Fp8Weight out, out_t;
  QuantStats stats;
  Outputs(const Tensor& master_before, const Tensor& m_before, const Tensor& v_before,
          std::int64_t E, std::int64_t N, std::int64_t K)
      : master(copy_of(master_before)),
        m(copy_of(m_before)),
        v(copy_of(v_before)),
        w(DType::kBf16, {E, N, K}),
        codes(DType::kE4m3, {E, N, K}),
        scales(DType::kFp32, {E, (N + 127) / 128, (K + 127) / 128}),
        codes_t(DType::kE4m3, {E, K, N}),
        scales_t(DType::kFp32, {E, (K + 127) / 128, (N + 127) / 128}),
        out{codes, scales, Scaling::kBlock},
        out_t{codes_t, scales_t, Scaling::kBlock} {}
};

TEST(AdamwQuantize, HasTheBytesOfItsParts) {
  Rng rng(1);
  const std::int64_t E = 2, N = 130, K = 77;
  const Tensor grad = random_normal(rng, DType::kFp32, {E, N, K}, 0.01),
               master = random_normal(rng, DType::kFp32, {E, N, K});
  AdamwOptions o;
  o.step = 3;
  o.clip = 0.5f;
  for (const DType moments : {DType::kFp32, DType::kBf16}) {
    const Tensor m = random_normal(rng, moments, {E, N, K}, 0.01), v = empty(moments, {E, N, K});
    for (std::int64_t i = 0; i < v.view().count(); ++i) set_value(v, i, 1e-4 * uniform(rng));
    on_all_contexts([&](const Context& ctx) {
      for (const bool pow2 : {false, true}) {
        Outputs got(master, m, v, E, N, K), want(master, m, v, E, N, K),
            alone(master, m, v, E, N, K);
        adamw_quantize(ctx, grad, o, got.master, got.m, got.v, got.w, pow2, got.out, got.out_t,
                       &got.stats);
        adamw_quantize(ctx, grad, o, alone.master, alone.m, alone.v, alone.w, pow2, alone.out, {},
                       nullptr);
        adamw(ctx, grad, o, want.master, want.m, want.v, want.w);
        quantize_weight(ctx, want.w, WeightScales::kBlock128, pow2, {}, want.out, want.out_t,
                        &want.stats);
        EXPECT_TRUE(bytes_equal(got.master, want.master) && bytes_equal(got.m, want.m) &&
                    bytes_equal(got.v, want.v) && bytes_equal(got.w, want.w));
        EXPECT_TRUE(bytes_equal(got.codes, want.codes) && bytes_equal(got.scales, want.scales));
        EXPECT_TRUE(bytes_equal(got.codes_t, want.codes_t) &&
                    bytes_equal(got.scales_t, want.scales_t));
        EXPECT_TRUE(bytes_equal(alone.codes, want.codes));
        EXPECT_TRUE(got.codes.guards_intact() && got.codes_t.guards_intact());
        EXPECT_EQ(got.stats.values, E * N * K);
        EXPECT_EQ(got.stats.blocks, want.stats.blocks);
        EXPECT_EQ(got.stats.flushed_to_zero, want.stats.flushed_to_zero);
        EXPECT_EQ(got.stats.amax_max, want.stats.amax_max);
      }
    });
  }
}

TEST(AdamwQuantize, RefusesOperandsThatDoNotFit) {
  tensor::Arena arena;
  const Context ctx = context(arena, Isa::kPortable);
  const std::int64_t E = 1, N = 8, K = 16;
  const Tensor x = empty(DType::kFp32, {E, N, K});
  Outputs o(x, x, x, E, N, K);
  const auto run = [&](const TensorView& grad, const AdamwOptions& options, const Fp8Weight& out) {
    adamw_quantize(ctx, grad, options, o.master, o.m, o.v, o.w, false, out, {}, nullptr);
  };
  const Tensor row_scales = empty(DType::kFp32, {E, N});
  AdamwOptions bad;
  bad.step = 0;
  EXPECT_THROW(run(x, bad, o.out), base::ContractError);
  EXPECT_THROW(run(x, {}, {o.codes, row_scales, Scaling::kRow}), base::ContractError);
  EXPECT_THROW(run(x, {}, o.out_t), base::ContractError);
  EXPECT_THROW(run(x.view().rows(0, 0), {}, o.out), base::ContractError);
}

}  // namespace
}  // namespace lockstep::ops::test

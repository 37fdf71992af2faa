// Biases and the bound of queries, keys and values: bytes against the contract's own loops.
#include "ops/bias.h"

#include <gtest/gtest.h>

#include "elementwise_util.h"

namespace lockstep::ops::test {
namespace {

using numerics::Bf16;
using numerics::to_bf16;
using numerics::to_float;

TEST(Bias, IsAddedBeforeTheOneRounding) {
  Rng rng(1);
  for (const std::int64_t N : {1, 7, 64, 129, 384})
    for (const std::int64_t T : {0, 1, 5}) {
      const Tensor x = random_normal(rng, DType::kFp32, {T, N});
      const Tensor bias = random_normal(rng, DType::kBf16, {N});
      on_all_contexts([&](const Context& ctx) {
        const Poisoned out(DType::kBf16, {T, N});
        add_bias(ctx, x, bias, out);
        EXPECT_TRUE(out.guards_intact() && out.all_written());
        for (std::int64_t i = 0; i < T * N; ++i)
          EXPECT_EQ(out.view().as<Bf16>()[i],
                    to_bf16(x.as<float>()[i] + to_float(bias.as<Bf16>()[i % N])));
      });
    }
}

TEST(Bias, GradientIsTheSumOfRowsInBlocksOf128) {
  Rng rng(2);
  for (const std::int64_t N : {1, 63, 65, 200})
    for (const std::int64_t T : {0, 1, 127, 128, 129, 300}) {
      SCOPED_TRACE(fmt::format("T {} N {}", T, N));
      const Tensor dy = random_normal(rng, DType::kBf16, {T, N});
      const Tensor before = random_normal(rng, DType::kFp32, {N});
      on_all_contexts([&](const Context& ctx) {
        const Tensor d = copy_of(before);
        bias_backward(ctx, dy, d);
        for (std::int64_t n = 0; n < N; ++n) {
          float total = 0;
          for (std::int64_t begin = 0; begin < T; begin += 128) {
            float acc = 0;
            for (std::int64_t t = begin; t < std::min(T, begin + 128); ++t)
              acc = acc + to_float(dy.as<Bf16>()[t * N + n]);
            total = total + acc;
          }
          ASSERT_EQ(d.as<float>()[n], before.as<float>()[n] + total) << n;
        }
      });
    }
}

TEST(Clip, CutsAtTheLimitAndItsGradientIsZeroThere) {
  const Bf16 limit = to_bf16(1.5f);
  const std::vector<float> in = {0.0f, -0.0f, 1.0f,  1.5f, -1.5f,    1.5078125f, -1.5078125f,
                                 9e9f, -9e9f, 1e-9f, NAN,  INFINITY, -INFINITY,  -1.0f};
  const std::vector<float> cut = {0.0f, -0.0f, 1.0f,  1.5f, -1.5f, 1.5f,  -1.5f,
                                  1.5f, -1.5f, 1e-9f, NAN,  1.5f,  -1.5f, -1.0f};
  const auto n = static_cast<std::int64_t>(in.size());
  on_all_contexts([&](const Context& ctx) {
    const Tensor x = empty(DType::kBf16, {n}), d = empty(DType::kBf16, {n});
    for (std::int64_t i = 0; i < n; ++i) {
      x.as<Bf16>()[i] = to_bf16(in[index(i)]);
      d.as<Bf16>()[i] = to_bf16(-3.0f);
    }
    clip(ctx, x, limit);
    clip_backward(ctx, x, limit, d);
    for (std::int64_t i = 0; i < n; ++i) {
      EXPECT_EQ(x.as<Bf16>()[i], to_bf16(cut[index(i)])) << i;
      const bool passes = !(std::fabs(cut[index(i)]) >= 1.5f);
      EXPECT_EQ(d.as<Bf16>()[i], to_bf16(passes ? -3.0f : 0.0f)) << i;
    }
  });
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const Tensor x = empty(DType::kBf16, {1});
  EXPECT_THROW(clip(ctx, x, to_bf16(0.0f)), base::ContractError);
  EXPECT_THROW(clip(ctx, x, to_bf16(-1.0f)), base::ContractError);
}

}  // namespace
}  // namespace lockstep::ops::test

// Per-head products against bf16_gemm and bf16_weight_gradient on copies of the pieces.
#include "ops/head_gemm.h"

#include <gtest/gtest.h>

#include "elementwise_util.h"

namespace lockstep::ops::test {
namespace {

using numerics::Bf16;

// Head h's piece of every row as a matrix [T, width].
Tensor matrix(const Columns& x, std::int64_t h, std::int64_t width) {
  const std::int64_t T = x.slab_TN.dim(0), N = x.slab_TN.dim(1);
  Tensor out = empty(DType::kBf16, {T, width});
  for (std::int64_t t = 0; t < T; ++t)
    for (std::int64_t i = 0; i < width; ++i)
      out.as<Bf16>()[t * width + i] = x.slab_TN.as<Bf16>()[t * N + x.column + h * x.stride + i];
  return out;
}

struct Sizes {
  std::int64_t T, H, before, rows, behind, L;
};
const Sizes kSizes[] = {{0, 2, 0, 8, 8, 16},       {1, 1, 0, 1, 0, 1},
                        {5, 3, 7, 13, 2, 9},       {65, 2, 128, 128, 0, 64},
                        {131, 2, 0, 128, 128, 96}, {300, 1, 16, 32, 0, 512}};

TEST(HeadGemm, HasTheBitsOfTheGemm) {
  Rng rng(1);
  for (const Sizes& n : kSizes)
    for (const BLayout layout : {BLayout::kNK, BLayout::kKN}) {
      SCOPED_TRACE(fmt::format("T {} H {} rows {} L {} {}", n.T, n.H, n.rows, n.L,
                               static_cast<int>(layout)));
      const bool nk = layout == BLayout::kNK;
      const std::int64_t K = nk ? n.L : n.rows, N = nk ? n.rows : n.L;
      const Tensor w_HNL =
          random_normal(rng, DType::kBf16, {n.H, n.before + n.rows + n.behind, n.L});
      const HeadRows b{w_HNL, n.before, n.rows};
      const Tensor a_slab = random_normal(rng, DType::kBf16, {n.T, 3 + n.H * (K + 5)});
      const Columns a{a_slab, 3, K + 5};
      on_all_contexts([&](const Context& ctx) {
        const Poisoned slab(DType::kBf16, {n.T, 1 + n.H * (N + 2)});
        const Columns d{slab, 1, N + 2};
        head_gemm(ctx, a, b, layout, d);
        EXPECT_TRUE(slab.guards_intact());
        for (std::int64_t h = 0; h < n.H; ++h) {
          const Tensor want = empty(DType::kBf16, {n.T, N});
          const TensorView w = b.w_HNL.rows(h, 1).reshape({n.before + n.rows + n.behind, n.L});
          bf16_gemm(ctx, matrix(a, h, K), w.rows(n.before, n.rows).reshape({1, n.rows, n.L}),
                    layout, {}, want);
          EXPECT_TRUE(bytes_equal(matrix(d, h, N), want)) << "head " << h;
        }
        std::int64_t kept = 0;
        for (std::int64_t i = 0; i < slab.view().count(); ++i)
          kept += slab.view().as<Bf16>()[i].bits == 0xFFFF ? 1 : 0;
        EXPECT_EQ(kept, n.T * (1 + n.H * 2));
      });
    }
}

TEST(HeadWeightGradient, HasTheBitsOfTheWeightGradient) {
  Rng rng(2);
  for (const Sizes& n : kSizes)
    for (const bool accumulate : {false, true}) {
      SCOPED_TRACE(fmt::format("T {} H {} rows {} L {}", n.T, n.H, n.rows, n.L));
      const std::int64_t R = n.before + n.rows + n.behind;
      const Tensor y_slab = random_normal(rng, DType::kBf16, {n.T, 3 + n.H * (n.rows + 5)});
      const Columns y{y_slab, 3, n.rows + 5};
      const Tensor x_slab = random_normal(rng, DType::kBf16, {n.T, n.H * (n.L + 2)});
      const Columns x{x_slab, 0, n.L + 2};
      const Tensor start = random_normal(rng, DType::kFp32, {n.H, R, n.L});
      on_all_contexts([&](const Context& ctx) {
        const Tensor got = empty(DType::kFp32, {n.H, R, n.L});
        const Tensor want = empty(DType::kFp32, {n.H, R, n.L});
        std::memcpy(got.view().data, start.view().data, got.view().bytes());
        std::memcpy(want.view().data, start.view().data, got.view().bytes());
        head_weight_gradient(ctx, y, x, accumulate, {got, n.before, n.rows});
        for (std::int64_t h = 0; h < n.H; ++h)
          bf16_weight_gradient(ctx, matrix(y, h, n.rows), matrix(x, h, n.L), {}, accumulate,
                               want.view()
                                   .rows(h, 1)
                                   .reshape({R, n.L})
                                   .rows(n.before, n.rows)
                                   .reshape({1, n.rows, n.L}));
        EXPECT_TRUE(bytes_equal(got, want));
      });
    }
}

TEST(HeadGemm, RefusesWhatDoesNotFit) {
  tensor::Arena arena;
  const Context ctx = context(arena, tensor::best_isa());
  const Tensor a = empty(DType::kBf16, {3, 40}), d = empty(DType::kBf16, {3, 24});
  const Tensor w = empty(DType::kBf16, {2, 12, 16});
  const auto run = [&](const Columns& from, const HeadRows& b, const Columns& to) {
    head_gemm(ctx, from, b, BLayout::kNK, to);
  };
  EXPECT_NO_THROW(run({a, 0, 20}, {w, 4, 8}, {d, 0, 8}));
  EXPECT_THROW(run({a, 5, 20}, {w, 4, 8}, {d, 0, 8}), base::ContractError);
  EXPECT_THROW(run({a, 0, 15}, {w, 4, 8}, {d, 0, 8}), base::ContractError);
  EXPECT_THROW(run({a, 0, 20}, {w, 5, 8}, {d, 0, 8}), base::ContractError);
  EXPECT_THROW(run({a, 0, 20}, {w, 4, 8}, {d, 9, 8}), base::ContractError);
  EXPECT_THROW(run({a, 0, 20}, {w, 4, 8}, {empty(DType::kBf16, {4, 24}), 0, 8}),
               base::ContractError);
}

}  // namespace
}  // namespace lockstep::ops::test

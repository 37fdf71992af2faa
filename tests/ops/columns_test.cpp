// RMSNorm and rotary embedding of columns, against the ops on whole tensors and the formulas.
#include "ops/columns.h"

#include <gtest/gtest.h>

#include <functional>

#include "elementwise_util.h"
#include "ops/norm.h"

namespace lockstep::ops::test {
namespace {

using numerics::Bf16;
using numerics::to_float;

constexpr float kEps = 1e-6f;

// The piece of every head as a tensor [T, heads, width] of its own.
Tensor piece(const Columns& x, std::int64_t heads, std::int64_t width) {
  const std::int64_t T = x.slab_TN.dim(0), N = x.slab_TN.dim(1);
  Tensor out = empty(DType::kBf16, {T, heads, width});
  for (std::int64_t t = 0; t < T; ++t)
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t i = 0; i < width; ++i)
        out.as<Bf16>()[(t * heads + h) * width + i] =
            x.slab_TN.as<Bf16>()[t * N + x.column + h * x.stride + i];
  return out;
}

// That all of the slab but the piece is as it was: all bits set.
void expect_rest_untouched(const Columns& x, std::int64_t heads, std::int64_t width) {
  const std::int64_t T = x.slab_TN.dim(0), N = x.slab_TN.dim(1);
  std::int64_t written = 0;
  for (std::int64_t t = 0; t < T; ++t)
    for (std::int64_t n = 0; n < N; ++n) {
      bool inside = false;
      for (std::int64_t h = 0; h < heads; ++h)
        inside = inside || (n >= x.column + h * x.stride && n < x.column + h * x.stride + width);
      written += !inside && x.slab_TN.as<Bf16>()[t * N + n].bits != 0xFFFF ? 1 : 0;
    }
  EXPECT_EQ(written, 0);
}

TEST(RmsNormColumns, HasTheBitsOfTheNorm) {
  Rng rng(1);
  for (const std::int64_t D : {1, 8, 127, 128, 512, 1031})
    for (const std::int64_t T : {0, 1, 5, 131}) {
      SCOPED_TRACE(fmt::format("T {} D {}", T, D));
      const Tensor slab = random_normal(rng, DType::kBf16, {T, D + 40});
      const Tensor d_slab = random_normal(rng, DType::kBf16, {T, D + 3});
      const Tensor w = random_normal(rng, DType::kBf16, {D});
      const Tensor start = random_normal(rng, DType::kFp32, {D});
      const Columns x{slab, 37}, d_h{d_slab, 2};
      const Tensor whole = piece(x, 1, D), d_whole = piece(d_h, 1, D);
      const TensorView x_TD = whole.view().reshape({T, D}), d_TD = d_whole.view().reshape({T, D});
      on_all_contexts([&](const Context& ctx) {
        const Tensor h = empty(DType::kBf16, {T, D}), rstd = empty(DType::kFp32, {T}),
                     dx = empty(DType::kBf16, {T, D}), dw = empty(DType::kFp32, {D});
        std::memcpy(dw.view().data, start.view().data, dw.view().bytes());
        rms_norm(ctx, x_TD, {}, w, kEps, x_TD, h, rstd);
        rms_norm_backward(ctx, d_TD, {}, x_TD, w, rstd, dx, dw);

        const Poisoned h_slab(DType::kBf16, {T, D + 9}), got_rstd(DType::kFp32, {T}),
            dx_slab(DType::kBf16, {T, D + 5});
        const Tensor got_dw = empty(DType::kFp32, {D});
        std::memcpy(got_dw.view().data, start.view().data, dw.view().bytes());
        const Columns got_h{h_slab, 9}, got_dx{dx_slab, 1};
        rms_norm_columns(ctx, x, w, kEps, got_h, got_rstd);
        rms_norm_columns_backward(ctx, d_h, x, w, got_rstd, got_dx, got_dw);
        EXPECT_TRUE(bytes_equal(got_rstd, rstd));
        EXPECT_TRUE(bytes_equal(piece(got_h, 1, D).view().reshape({T, D}), h));
        EXPECT_TRUE(bytes_equal(piece(got_dx, 1, D).view().reshape({T, D}), dx));
        EXPECT_TRUE(bytes_equal(got_dw, dw));
        expect_rest_untouched(got_h, 1, D);
        expect_rest_untouched(got_dx, 1, D);
        EXPECT_TRUE(h_slab.guards_intact() && dx_slab.guards_intact());

        // d_x over d_h.
        const Tensor over = empty(DType::kBf16, {T, D});
        std::memcpy(over.view().data, d_TD.data, d_TD.bytes());
        std::memcpy(got_dw.view().data, start.view().data, dw.view().bytes());
        rms_norm_columns_backward(ctx, {over}, x, w, got_rstd, {over}, got_dw);
        EXPECT_TRUE(bytes_equal(over, dx));
        EXPECT_TRUE(bytes_equal(got_dw, dw));
      });
    }
}

TEST(RopeColumns, FollowsTheContract) {
  Rng rng(2);
  const std::int64_t P = 50;
  for (const std::int64_t R : {2, 6, 64})
    for (const std::int64_t H : {1, 3})
      for (const std::int64_t T : {0, 1, 17})
        for (const RopePairs pairs : {RopePairs::kHalves, RopePairs::kInterleaved}) {
          SCOPED_TRACE(fmt::format("R {} H {} T {} {}", R, H, T, static_cast<int>(pairs)));
          const Tensor c = empty(DType::kFp32, {P, R / 2}), s = empty(DType::kFp32, {P, R / 2});
          rope_table(10000.0, c, s);
          std::vector<std::int32_t> p;
          for (std::int64_t t = 0; t < T; ++t)
            p.push_back(static_cast<std::int32_t>(uniform_int(rng, 0, P - 1)));
          const Tensor positions = int32_tensor(p);
          const Tensor from_slab = random_normal(rng, DType::kBf16, {T, 5 + H * (R + 7)});
          const Columns x{from_slab, 5, R + 7};
          const Tensor from = piece(x, H, R);
          on_all_contexts([&](const Context& ctx) {
            const Poisoned slab(DType::kBf16, {T, 3 + H * (R + 2)}),
                d_slab(DType::kBf16, {T, 4 + H * (R + 1)});
            const Columns out{slab, 3, R + 2}, d_x{d_slab, 4, R + 1};
            rope_columns(ctx, x, H, pairs, positions, c, s, out);
            rope_columns_backward(ctx, x, H, pairs, positions, c, s, d_x);
            expect_rest_untouched(out, H, R);
            expect_rest_untouched(d_x, H, R);
            EXPECT_TRUE(slab.guards_intact() && d_slab.guards_intact());
            const Tensor got = piece(out, H, R), d_got = piece(d_x, H, R);
            for (std::int64_t row = 0; row < T * H; ++row)
              for (std::int64_t i = 0; i < R / 2; ++i) {
                const auto at = [&](const Tensor& t, std::int64_t k) {
                  return t.as<Bf16>()[row * R + k];
                };
                const bool side = pairs == RopePairs::kInterleaved;
                const std::int64_t i1 = side ? 2 * i : i, i2 = side ? 2 * i + 1 : i + R / 2;
                const std::int64_t place = p[index(row / H)] * (R / 2) + i;
                const float cos = c.as<float>()[place], sin = s.as<float>()[place];
                const float x1 = to_float(at(from, i1)), x2 = to_float(at(from, i2));
                EXPECT_EQ(at(got, i), numerics::to_bf16(std::fma(x1, cos, -(x2 * sin))));
                EXPECT_EQ(at(got, i + R / 2), numerics::to_bf16(std::fma(x2, cos, x1 * sin)));
                const float d1 = to_float(at(from, i)), d2 = to_float(at(from, i + R / 2));
                EXPECT_EQ(at(d_got, i1), numerics::to_bf16(std::fma(d1, cos, d2 * sin)));
                EXPECT_EQ(at(d_got, i2), numerics::to_bf16(std::fma(d2, cos, -(d1 * sin))));
              }
          });
        }
}

// Halves without a norm are what head_norm_rope does.
TEST(RopeColumns, HalvesAreThoseOfHeadNormRope) {
  Rng rng(3);
  const std::int64_t T = 9, H = 2, R = 32, P = 20;
  const Tensor c = empty(DType::kFp32, {P, R / 2}), s = empty(DType::kFp32, {P, R / 2});
  rope_table(500.0, c, s);
  const Tensor positions = int32_tensor({0, 3, 19, 4, 5, 6, 7, 8, 9});
  const Tensor slab = random_normal(rng, DType::kBf16, {T, 10 + H * R});
  const Tensor want = empty(DType::kBf16, {T, H, R}), got = empty(DType::kBf16, {T, H * R});
  tensor::Arena arena;
  const Context ctx = context(arena, tensor::best_isa());
  head_norm_rope(ctx, {slab, 10}, {}, kEps, positions, c, s, {}, want);
  rope_columns(ctx, {slab, 10, R}, H, RopePairs::kHalves, positions, c, s, {got, 0, R});
  EXPECT_TRUE(bytes_equal(got.view().reshape({T, H, R}), want));
}

TEST(Columns, RefuseWhatDoesNotFit) {
  Rng rng(4);
  tensor::Arena arena;
  const Context ctx = context(arena, tensor::best_isa());
  const Tensor slab = random_normal(rng, DType::kBf16, {3, 20}), w = empty(DType::kBf16, {8});
  const Tensor out = empty(DType::kBf16, {3, 20}), rstd = empty(DType::kFp32, {3});
  EXPECT_NO_THROW(rms_norm_columns(ctx, {slab, 12}, w, kEps, {out, 0}, rstd));
  EXPECT_THROW(rms_norm_columns(ctx, {slab, 13}, w, kEps, {out, 0}, rstd), base::ContractError);
  EXPECT_THROW(rms_norm_columns(ctx, {slab, -1}, w, kEps, {out, 0}, rstd), base::ContractError);
  EXPECT_THROW(rms_norm_columns(ctx, {slab, 0}, w, kEps, {out, 0}, empty(DType::kFp32, {4})),
               base::ContractError);
  const Tensor c = empty(DType::kFp32, {5, 4}), s = empty(DType::kFp32, {5, 4});
  const auto rope = [&](const std::vector<std::int32_t>& p, std::int64_t column,
                        std::int64_t stride) {
    rope_columns(ctx, {slab, column, stride}, 2, RopePairs::kInterleaved, int32_tensor(p), c, s,
                 {out, 0, 8});
  };
  EXPECT_NO_THROW(rope({0, 4, 1}, 4, 8));
  EXPECT_THROW(rope({0, 5, 1}, 4, 8), base::ContractError);
  EXPECT_THROW(rope({0, -1, 1}, 4, 8), base::ContractError);
  EXPECT_THROW(rope({0, 4, 1}, 5, 8), base::ContractError);
  EXPECT_THROW(rope({0, 4, 1}, 4, 7), base::ContractError);
}

}  // namespace
}  // namespace lockstep::ops::test

// Ops that quantize what they compute, or both layouts at once, against their parts, by bytes.
#include <gtest/gtest.h>

#include "ops/elementwise_util.h"
#include "ops/norm_quantize.h"
#include "ops/permute_quantize.h"
#include "ops/swiglu.h"

namespace lockstep::ops::test {
namespace {

constexpr std::int64_t kRoom = 512;  // more than the segments take

struct Outputs {
  Poisoned codes, scales, column_codes, column_scales;
  Fp8Rows rows;
  Fp8Columns columns;
  QuantStats stats;
  Outputs(std::int64_t M, std::int64_t N, std::int64_t E, Scaling scaling)
      : codes(DType::kE4m3, {M, N}),
        scales(DType::kFp32, scaling == Scaling::kBlock ? Shape{(N + 127) / 128, M} : Shape{M}),
        column_codes(DType::kE4m3, {N, kRoom}),
        column_scales(DType::kFp32,
                      scaling == Scaling::kBlock ? Shape{kRoom / 128, N} : Shape{E, N}),
        rows{codes, scales, scaling},
        columns{column_codes, column_scales, scaling} {}
};

void expect_same(const Outputs& a, const Outputs& b) {
  EXPECT_TRUE(bytes_equal(a.codes, b.codes) && bytes_equal(a.scales, b.scales));
  EXPECT_TRUE(bytes_equal(a.column_codes, b.column_codes));
  EXPECT_TRUE(bytes_equal(a.column_scales, b.column_scales));
  EXPECT_TRUE(a.codes.guards_intact() && a.scales.guards_intact() &&
              a.column_codes.guards_intact() && a.column_scales.guards_intact());
  EXPECT_EQ(a.stats.values, b.stats.values);
  EXPECT_EQ(a.stats.blocks, b.stats.blocks);
  EXPECT_EQ(a.stats.flushed_to_zero, b.stats.flushed_to_zero);
  EXPECT_EQ(a.stats.amax_max, b.stats.amax_max);
}

struct Rows {
  Tensor offsets = int32_tensor({0, 130, 130, 139}), padded = int32_tensor({0, 256, 256, 384});
  Segments segments{offsets, padded};
  std::int64_t M = 139, E = 3;
};

void write_both(const Context& ctx, const TensorView& x, const Segments& segments, Outputs& out) {
  quantize_rows(ctx, x, false, out.rows, &out.stats);
  quantize_columns(ctx, x, segments, false, out.columns, nullptr);
}

TEST(FusedQuantize, RowsAndColumns) {
  const Rows r;
  Rng rng(1);
  const Tensor x = random_normal(rng, DType::kBf16, {r.M, 200});
  on_all_contexts([&](const Context& ctx) {
    for (const Scaling scaling : {Scaling::kBlock, Scaling::kRow}) {
      Outputs got(r.M, 200, r.E, scaling), want(r.M, 200, r.E, scaling);
      quantize_rows_columns(ctx, x, r.segments, false, got.rows, got.columns, &got.stats);
      write_both(ctx, x, r.segments, want);
      expect_same(got, want);
    }
  });
}

TEST(FusedQuantize, SwigluBackward) {
  const Rows r;
  Rng rng(2);
  const Tensor x = random_normal(rng, DType::kBf16, {r.M, 400}),
               d = random_normal(rng, DType::kBf16, {r.M, 200});
  on_all_contexts([&](const Context& ctx) {
    Outputs got(r.M, 400, r.E, Scaling::kBlock), want(r.M, 400, r.E, Scaling::kBlock),
        bare(r.M, 400, r.E, Scaling::kBlock);
    const Poisoned values(DType::kBf16, {r.M, 400}), want_values(DType::kBf16, {r.M, 400});
    swiglu_backward(ctx, x, d, want_values);
    write_both(ctx, want_values, r.segments, want);
    swiglu_backward_quantize(ctx, x, d, r.segments, false, values, got.rows, &got.columns,
                             &got.stats);
    swiglu_backward_quantize(ctx, x, d, r.segments, false, {}, bare.rows, &bare.columns,
                             &bare.stats);
    expect_same(got, want);
    expect_same(bare, want);
    EXPECT_TRUE(bytes_equal(values, want_values) && values.guards_intact());
  });
}

TEST(FusedQuantize, RmsNorm) {
  const Rows r;
  Rng rng(3);
  const Tensor x = random_normal(rng, DType::kBf16, {r.M, 200}),
               delta = random_normal(rng, DType::kBf16, {r.M, 200}),
               w = random_normal(rng, DType::kBf16, {200});
  on_all_contexts([&](const Context& ctx) {
    Outputs got(r.M, 200, r.E, Scaling::kBlock), want(r.M, 200, r.E, Scaling::kBlock),
        bare(r.M, 200, r.E, Scaling::kBlock);
    const Poisoned h(DType::kBf16, {r.M, 200}), out(DType::kBf16, {r.M, 200}),
        rstd(DType::kFp32, {r.M});
    const Poisoned want_h(DType::kBf16, {r.M, 200}), want_out(DType::kBf16, {r.M, 200}),
        want_rstd(DType::kFp32, {r.M});
    rms_norm(ctx, x, delta, w, 1e-6f, want_out, want_h, want_rstd);
    write_both(ctx, want_h, r.segments, want);
    rms_norm_quantize(ctx, x, delta, w, 1e-6f, out, {}, rstd, r.segments, false, bare.rows,
                      &bare.columns, &bare.stats);
    expect_same(bare, want);
    rms_norm_quantize(ctx, x, delta, w, 1e-6f, out, h, rstd, r.segments, false, got.rows,
                      &got.columns, &got.stats);
    expect_same(got, want);
    EXPECT_TRUE(bytes_equal(h, want_h) && bytes_equal(out, want_out) &&
                bytes_equal(rstd, want_rstd));
  });
}

TEST(FusedQuantize, WrongArgumentsAreNamed) {
  const Rows r;
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const Tensor x = empty(DType::kBf16, {r.M + 1, 200});
  Outputs out(r.M + 1, 200, r.E, Scaling::kBlock);
  EXPECT_THROW(quantize_rows_columns(ctx, x, r.segments, false, out.rows, out.columns, nullptr),
               base::ContractError);  // a row outside the segments
  const Outputs fits(r.M, 200, r.E, Scaling::kBlock), other(r.M, 200, r.E, Scaling::kRow);
  EXPECT_THROW(quantize_rows_columns(ctx, x.view().rows(0, r.M), r.segments, false, fits.rows,
                                     other.columns, nullptr),
               base::ContractError);  // two kinds of scales
}

}  // namespace
}  // namespace lockstep::ops::test

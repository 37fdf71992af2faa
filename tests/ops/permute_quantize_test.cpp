#include "ops/permute_quantize.h"

#include <gtest/gtest.h>

#include "ops/elementwise_util.h"

namespace lockstep::ops::test {
namespace {

// The op against permute, quantize_rows and quantize_columns one after the other, by bytes.
TEST(PermuteQuantize, EqualsItsParts) {
  constexpr std::int64_t T = 37, D = 200, E = 5, C = 2, M = T * C;
  Rng rng(3);
  on_all_contexts([&](const Context& ctx) {
    const Tensor h = random_normal(rng, tensor::DType::kBf16, {T, D});
    const Tensor experts = empty(tensor::DType::kInt32, {T, C}),
                 row = empty(tensor::DType::kInt32, {T, C});
    for (std::int64_t t = 0; t < T; ++t) {
      experts.as<std::int32_t>()[t * C] = static_cast<std::int32_t>(t % 3);  // expert 4 stays empty
      experts.as<std::int32_t>()[t * C + 1] = 3;
    }
    const Tensor offsets = empty(tensor::DType::kInt32, {E + 1});
    const Tensor padded = empty(tensor::DType::kInt32, {E + 1});
    const Segments segments{offsets, padded};
    const Tensor token = empty(tensor::DType::kInt32, {M});
    plan_permutation(ctx, experts, segments, row, token);
    const std::int64_t R = segments.padded_offsets_E1.as<std::int32_t>()[E];
    for (const Scaling scaling : {Scaling::kBlock, Scaling::kRow}) {
      const bool block = scaling == Scaling::kBlock;
      const tensor::Shape row_scales = block ? tensor::Shape{(D + 127) / 128, M} : tensor::Shape{M};
      const tensor::Shape column_scales = block ? tensor::Shape{R / 128, D} : tensor::Shape{E, D};
      const Poisoned codes(tensor::DType::kE4m3, {M, D}), scales(tensor::DType::kFp32, row_scales);
      const Poisoned column_codes(tensor::DType::kE4m3, {D, R}),
          columns(tensor::DType::kFp32, column_scales);
      const Poisoned want_codes(tensor::DType::kE4m3, {M, D}),
          want_scales(tensor::DType::kFp32, row_scales);
      const Poisoned want_column_codes(tensor::DType::kE4m3, {D, R}),
          want_columns(tensor::DType::kFp32, column_scales);
      QuantStats stats, want_stats;
      const Fp8Columns column_out{column_codes, columns, scaling};
      permute_quantize(ctx, h, token, segments, false, {codes, scales, scaling}, &column_out,
                       &stats);
      const Tensor gathered = empty(tensor::DType::kBf16, {M, D});
      permute(ctx, h, token, gathered);
      quantize_rows(ctx, gathered, false, {want_codes, want_scales, scaling}, &want_stats);
      quantize_columns(ctx, gathered, segments, false, {want_column_codes, want_columns, scaling},
                       nullptr);
      EXPECT_TRUE(bytes_equal(codes, want_codes) && bytes_equal(scales, want_scales));
      EXPECT_TRUE(bytes_equal(column_codes, want_column_codes) &&
                  bytes_equal(columns, want_columns));
      EXPECT_TRUE(codes.guards_intact() && scales.guards_intact() && column_codes.guards_intact() &&
                  columns.guards_intact());
      EXPECT_EQ(stats.values, want_stats.values);
      EXPECT_EQ(stats.amax_max, want_stats.amax_max);
    }
  });
}

}  // namespace
}  // namespace lockstep::ops::test

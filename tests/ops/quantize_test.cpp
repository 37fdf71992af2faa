// The quantizer against a scalar loop written from docs/numerics.md, section 5, and against the
// double reference.
#include "ops/quantize.h"

#include <gtest/gtest.h>

#include <functional>

#include "elementwise_util.h"
#include "ops/reference/quantize.h"

namespace lockstep::ops::test {
namespace {

using numerics::Bf16;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// E4M3 by looking for the nearest of the 127 magnitudes; ties go to the even code.
std::uint8_t search_e4m3(float x) {
  static const std::vector<double> magnitudes = [] {
    std::vector<double> m;
    for (int c = 0; c < 127; ++c)
      m.push_back(c < 8 ? c * 0x1p-9 : std::ldexp(8 + (c & 7), (c >> 3) - 10));
    return m;
  }();
  const std::uint8_t sign = std::signbit(x) ? 0x80 : 0;
  const double a = std::fabs(static_cast<double>(x));
  const auto above = static_cast<std::size_t>(
      std::lower_bound(magnitudes.begin(), magnitudes.end(), a) - magnitudes.begin());
  if (above == magnitudes.size()) return sign | 126;
  if (above == 0) return sign;
  const double down = a - magnitudes[above - 1], up = magnitudes[above] - a;
  const std::size_t code = down < up || (down == up && above % 2 == 1) ? above - 1 : above;
  return static_cast<std::uint8_t>(sign | code);
}

float contract_scale(float amax, bool pow2) {
  if (!std::isfinite(amax)) return kNan;
  if (amax == 0) return 1;
  const float s = std::max(amax / 448.0f, std::ldexp(1.0f, -100));
  if (!pow2) return s;
  int e = 0;
  return std::frexp(s, &e) == 0.5f ? s : std::ldexp(1.0f, e);
}

struct Quantized {
  std::vector<std::uint8_t> codes;  // one per value of x, in x's order
  std::vector<float> scales;        // one per block
  QuantStats stats;
};

// block[i] names the block of value i.
Quantized contract_quantize(const TensorView& x, const std::vector<std::size_t>& block,
                            std::size_t blocks, bool pow2) {
  std::vector<float> amax(blocks, 0.0f);
  Quantized out;
  out.codes.resize(block.size());
  for (std::size_t i = 0; i < block.size(); ++i) {
    const float a = std::fabs(static_cast<float>(get_value(x, static_cast<std::int64_t>(i))));
    float& m = amax[block[i]];
    m = std::isnan(a) || a > m ? a : m;  // once NaN it stays: a > NaN is false
  }
  for (const float a : amax) {
    out.scales.push_back(contract_scale(a, pow2));
    out.stats.blocks += 1;
    out.stats.zero_blocks += a == 0 ? 1 : 0;
    out.stats.nonfinite_blocks += std::isfinite(a) ? 0 : 1;
    if (a == 0 || !std::isfinite(a)) continue;
    out.stats.amax_max = std::max(out.stats.amax_max, a);
    out.stats.amax_min = out.stats.amax_min == 0 ? a : std::min(out.stats.amax_min, a);
  }
  for (std::size_t i = 0; i < block.size(); ++i) {
    const auto v = static_cast<float>(get_value(x, static_cast<std::int64_t>(i)));
    const float s = out.scales[block[i]];
    const float inv = 1.0f / s;
    out.codes[i] = std::isnan(s) ? 0x7F : search_e4m3(v * inv);
    out.stats.values += 1;
    out.stats.saturated += std::fabs(v * inv) > 464.0f ? 1 : 0;
    out.stats.flushed_to_zero += v != 0 && (out.codes[i] & 0x7F) == 0 ? 1 : 0;
  }
  return out;
}

bool same_bits(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) || numerics::float_bits(a) == numerics::float_bits(b);
}

void expect_stats(const QuantStats& got, const QuantStats& want) {
  EXPECT_EQ(got.values, want.values);
  EXPECT_EQ(got.saturated, want.saturated);
  EXPECT_EQ(got.flushed_to_zero, want.flushed_to_zero);
  EXPECT_EQ(got.blocks, want.blocks);
  EXPECT_EQ(got.zero_blocks, want.zero_blocks);
  EXPECT_EQ(got.nonfinite_blocks, want.nonfinite_blocks);
  EXPECT_EQ(got.amax_min, want.amax_min);
  EXPECT_EQ(got.amax_max, want.amax_max);
}

std::int64_t groups(std::int64_t n) { return (n + 127) / 128; }

// Values over many powers of two, with zeros, a zero block, and (where asked) non-finite values.
Tensor varied(Rng& rng, const Shape& shape, bool nonfinite) {
  Tensor x = empty(DType::kBf16, shape);
  for (std::int64_t i = 0; i < shape.count(); ++i) {
    const auto power = static_cast<int>(uniform_int(rng, -30, 8));
    const double v = std::ldexp(static_cast<double>(normal(rng)), power);
    set_value(x, i, uniform_int(rng, 0, 9) == 0 ? 0.0 : v);
    if (nonfinite && uniform_int(rng, 0, 400) == 0)
      x.as<Bf16>()[i].bits = uniform_int(rng, 0, 1) == 0 ? 0xFF80 : 0xFFC1;
  }
  if (shape[0] > 2)
    for (std::int64_t i = 0; i < shape.count() / shape[0]; ++i)
      set_value(x, shape.count() / shape[0] + i, -0.0);
  return x;
}

struct RowOutput {
  Poisoned codes, scales;
  Fp8Rows rows;
  RowOutput(std::int64_t M, std::int64_t K, Scaling scaling)
      : codes(DType::kE4m3, {M, K}),
        scales(DType::kFp32, scaling == Scaling::kBlock ? Shape{groups(K), M} : Shape{M}),
        rows{codes, scales, scaling} {}
};

void check_rows(const Tensor& x, bool pow2, Scaling scaling) {
  const std::int64_t M = x.view().dim(0), K = x.view().dim(1);
  const bool blocks = scaling == Scaling::kBlock;
  std::vector<std::size_t> block;
  for (std::int64_t m = 0; m < M; ++m)
    for (std::int64_t k = 0; k < K; ++k) block.push_back(index(blocks ? k / 128 * M + m : m));
  const Quantized want = contract_quantize(x, block, index(blocks ? groups(K) * M : M), pow2);
  on_all_contexts([&](const Context& ctx) {
    const RowOutput out(M, K, scaling);
    QuantStats stats;
    quantize_rows(ctx, x, pow2, out.rows, &stats);
    EXPECT_TRUE(out.codes.guards_intact() && out.scales.guards_intact());
    std::int64_t different = 0;
    for (std::size_t i = 0; i < want.codes.size(); ++i)
      different += out.codes.view().fp8()[i] != want.codes[i] ? 1 : 0;
    EXPECT_EQ(different, 0);
    for (std::size_t i = 0; i < want.scales.size(); ++i)
      EXPECT_TRUE(same_bits(out.scales.view().as<float>()[i], want.scales[i])) << i;
    expect_stats(stats, want.stats);
  });
}

TEST(Quantize, RowsFollowTheContract) {
  Rng rng(1);
  for (const Scaling scaling : {Scaling::kBlock, Scaling::kRow})
    for (const bool pow2 : {false, true})
      for (const std::int64_t K : {0, 1, 127, 128, 129, 576})
        for (const std::int64_t M : {0, 1, 37}) {
          SCOPED_TRACE(fmt::format("M {} K {} pow2 {}", M, K, pow2));
          check_rows(varied(rng, {M, K}, K > 1), pow2, scaling);
        }
}

// Every BF16 value as a block of its own: every amax there is, subnormal, largest, infinite, NaN.
TEST(Quantize, EveryBf16AsItsOwnBlock) {
  const Tensor x = empty(DType::kBf16, {65536, 1});
  for (std::int64_t i = 0; i < 65536; ++i) x.as<Bf16>()[i].bits = static_cast<std::uint16_t>(i);
  for (const bool pow2 : {false, true}) check_rows(x, pow2, Scaling::kBlock);
}

// Every BF16 value under the scale that a larger neighbour sets.
TEST(Quantize, EveryBf16UnderAFewScales) {
  for (const std::uint16_t anchor : {0x0001, 0x0080, 0x0D80, 0x3F80, 0x4049, 0x7F7F}) {
    const Tensor x = empty(DType::kBf16, {65536 / 64, 65});
    for (std::int64_t i = 0; i < 65536; ++i) {
      const auto bits = static_cast<std::uint16_t>(i);
      x.as<Bf16>()[i / 64 * 65 + 1 + i % 64].bits = (bits & 0x7FFF) <= anchor ? bits : anchor;
    }
    for (std::int64_t m = 0; m < 65536 / 64; ++m) x.as<Bf16>()[m * 65].bits = anchor;
    for (const bool pow2 : {false, true}) check_rows(x, pow2, Scaling::kBlock);
  }
}

TEST(Quantize, ARowDoesNotSeeItsNeighbours) {
  Rng rng(2);
  const std::int64_t M = 19, K = 200;
  const Tensor x = varied(rng, {M, K}, false);
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const RowOutput all(M, K, Scaling::kBlock);
  quantize_rows(ctx, x, false, all.rows, nullptr);
  for (const std::int64_t m : {0, 7, 18}) {
    const RowOutput one(1, K, Scaling::kBlock);
    quantize_rows(ctx, x.view().rows(m, 1), false, one.rows, nullptr);
    EXPECT_TRUE(bytes_equal(one.codes, all.codes.view().rows(m, 1)));
    for (std::int64_t g = 0; g < groups(K); ++g)
      EXPECT_EQ(one.scales.view().as<float>()[g], all.scales.view().as<float>()[g * M + m]);
  }
}

// Distance to the reference: one step of E4M3 where FP32's rounding crosses a tie, and half a step
// to the value itself.
TEST(Quantize, RowsAgainstTheReference) {
  Rng rng(3);
  const std::int64_t M = 64, K = 300;
  const Tensor x = random_normal(rng, DType::kBf16, {M, K});
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  std::vector<std::int64_t> block;
  for (std::int64_t i = 0; i < M * K; ++i) block.push_back(i / K * groups(K) + i % K / 128);
  for (const bool pow2 : {false, true}) {
    const RowOutput out(M, K, Scaling::kBlock);
    quantize_rows(ctx, x, pow2, out.rows, nullptr);
    const std::vector<double> want = reference::fake_quantize(values(x), block, pow2);
    std::int64_t apart = 0;
    for (std::int64_t i = 0; i < M * K; ++i) {
      const double s = out.scales.view().as<float>()[i % K / 128 * M + i / K];
      const double got = get_value(out.codes, i) * s, v = get_value(x, i);
      const double half_step = std::max(std::fabs(v) * 0x1p-4, s * 0x1p-10) * (1 + 0x1p-20);
      EXPECT_LE(std::fabs(got - v), half_step);
      EXPECT_LE(std::fabs(got - want[index(i)]), 2 * half_step);
      apart += std::fabs(got - want[index(i)]) > half_step ? 1 : 0;
    }
    EXPECT_LE(apart, pow2 ? 0 : M * K / 1000);
  }
}

TEST(Quantize, SecondQuantizationIsIdempotentWithPowersOfTwo) {
  Rng rng(4);
  const std::int64_t M = 40, K = 300;
  const Tensor x = varied(rng, {M, K}, false);
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const RowOutput first(M, K, Scaling::kBlock), second(M, K, Scaling::kBlock);
  const Poisoned back(DType::kBf16, {M, K}), again(DType::kBf16, {M, K});
  quantize_rows(ctx, x, true, first.rows, nullptr);
  dequantize_rows(ctx, first.rows, back);
  quantize_rows(ctx, back, true, second.rows, nullptr);
  dequantize_rows(ctx, second.rows, again);
  EXPECT_TRUE(back.guards_intact() && back.all_written());
  EXPECT_TRUE(bytes_equal(again, back));
  // Where no value was rounded across a power of two, scales and codes are the same too.
  for (std::int64_t m = 0; m < M; ++m)
    for (std::int64_t g = 0; g < groups(K); ++g) {
      if (first.scales.view().as<float>()[g * M + m] != second.scales.view().as<float>()[g * M + m])
        continue;
      for (std::int64_t k = g * 128; k < std::min(K, g * 128 + 128); ++k)
        EXPECT_EQ(second.codes.view().fp8()[m * K + k], first.codes.view().fp8()[m * K + k]);
    }
}

struct SegmentCase {
  std::vector<std::int32_t> offsets{0}, padded{0};
  Tensor offsets_E1, padded_E1;
  explicit SegmentCase(const std::vector<std::int32_t>& counts) {
    for (const std::int32_t n : counts) {
      offsets.push_back(offsets.back() + n);
      padded.push_back(padded.back() + (n + 127) / 128 * 128);
    }
    offsets_E1 = int32_tensor(offsets);
    padded_E1 = int32_tensor(padded);
  }
  Segments segments() const { return {offsets_E1, padded_E1}; }
};

void check_columns(Rng& rng, const std::vector<std::int32_t>& counts, std::int64_t N,
                   std::int64_t spare, bool pow2, Scaling scaling) {
  const SegmentCase s(counts);
  const auto E = static_cast<std::int64_t>(counts.size());
  const std::int64_t M = s.offsets.back(), R = s.padded.back() + spare;
  const bool blocks = scaling == Scaling::kBlock;
  const Tensor x = varied(rng, {M, N}, M > 3);
  // Blocks that hold tokens, numbered as they come; `where` maps the scale tensor to them.
  std::vector<std::size_t> block;
  std::vector<std::int64_t> row_of(index(R), -1);
  std::vector<std::int64_t> where(index(blocks ? R / 128 : E), -1);
  std::int64_t used = 0;
  for (std::int64_t e = 0; e < E; ++e)
    for (std::int64_t i = 0; i < counts[index(e)]; ++i) {
      const std::int64_t r = s.padded[index(e)] + i;
      std::int64_t& at = where[index(blocks ? r / 128 : e)];
      if (at < 0) at = used++;
      row_of[index(r)] = s.offsets[index(e)] + i;
      for (std::int64_t n = 0; n < N; ++n) block.push_back(index(at * N + n));
    }
  const Quantized want = contract_quantize(x, block, index(used * N), pow2);
  on_all_contexts([&](const Context& ctx) {
    const Poisoned codes(DType::kE4m3, {N, R});
    const Poisoned scales(DType::kFp32, {blocks ? R / 128 : E, N});
    QuantStats stats;
    quantize_columns(ctx, x, s.segments(), pow2, {codes, scales, scaling}, &stats);
    EXPECT_TRUE(codes.guards_intact() && scales.guards_intact());
    std::int64_t different = 0;
    for (std::int64_t n = 0; n < N; ++n)
      for (std::int64_t r = 0; r < R; ++r) {
        const std::int64_t m = row_of[index(r)];
        const std::uint8_t untouched = r >= s.padded.back() ? 0xFF : 0;
        different +=
            codes.view().fp8()[n * R + r] != (m < 0 ? untouched : want.codes[index(m * N + n)]);
      }
    EXPECT_EQ(different, 0);
    for (std::size_t i = 0; i < where.size(); ++i)
      for (std::int64_t n = 0; n < N; ++n) {
        const float scale = scales.view().as<float>()[static_cast<std::int64_t>(i) * N + n];
        if (blocks && static_cast<std::int64_t>(i) * 128 >= s.padded.back())
          EXPECT_EQ(numerics::float_bits(scale), 0xFFFFFFFFu);
        else
          EXPECT_TRUE(same_bits(scale, where[i] < 0 ? 1.0f : want.scales[index(where[i] * N + n)]));
      }
    expect_stats(stats, want.stats);
  });
}

TEST(Quantize, ColumnsFollowTheContract) {
  Rng rng(5);
  for (const Scaling scaling : {Scaling::kBlock, Scaling::kRow})
    for (const bool pow2 : {false, true})
      for (const std::int64_t N : {1, 31, 33, 96}) {
        check_columns(rng, {128}, N, 0, pow2, scaling);
        check_columns(rng, {129, 0, 1, 127, 300}, N, 256, pow2, scaling);
        check_columns(rng, {0, 0}, N, 128, pow2, scaling);
        check_columns(rng, {0}, N, 0, pow2, scaling);
      }
}

// `kind` written as blocks of w [E, N, K]; the transposed copy the same way.
void check_weight(Rng& rng, std::int64_t E, std::int64_t N, std::int64_t K, WeightScales kind,
                  const std::vector<std::int64_t>& part_rows, bool pow2) {
  SCOPED_TRACE(fmt::format("E {} N {} K {} kind {} parts {}", E, N, K, static_cast<int>(kind),
                           fmt::join(part_rows, " ")));
  const Tensor w = varied(rng, {E, N, K}, false);
  const bool blocks = kind == WeightScales::kBlock128;
  const std::int64_t NB = groups(N), KB = groups(K);
  std::vector<std::int64_t> part_of;  // by row
  for (std::size_t i = 0; i < part_rows.size(); ++i)
    part_of.insert(part_of.end(), index(part_rows[i]), static_cast<std::int64_t>(i));
  part_of.resize(index(N));
  const std::int64_t parts = std::max<std::int64_t>(1, static_cast<std::int64_t>(part_rows.size()));
  std::vector<std::size_t> block, block_t;
  for (std::int64_t e = 0; e < E; ++e)
    for (std::int64_t n = 0; n < N; ++n)
      for (std::int64_t k = 0; k < K; ++k) {
        const std::int64_t tile = (e * NB + n / 128) * KB + k / 128;
        const bool row = kind == WeightScales::kPerRow;
        block.push_back(index(blocks ? tile : row ? e * N + n : e * parts + part_of[index(n)]));
        block_t.push_back(index(blocks ? tile : row ? e * K + k : e));
      }
  const std::int64_t count = blocks                          ? E * NB * KB
                             : kind == WeightScales::kPerRow ? E * N
                                                             : E * parts;
  const std::int64_t count_t = blocks ? count : kind == WeightScales::kPerRow ? E * K : E;
  const Quantized want = contract_quantize(w, block, index(count), pow2);
  const Quantized want_t = contract_quantize(w, block_t, index(count_t), pow2);
  on_all_contexts([&](const Context& ctx) {
    const Scaling scaling = blocks ? Scaling::kBlock : Scaling::kRow;
    const Poisoned codes(DType::kE4m3, {E, N, K}), codes_t(DType::kE4m3, {E, K, N});
    const Poisoned scales(DType::kFp32, blocks ? Shape{E, NB, KB} : Shape{E, N});
    const Poisoned scales_t(DType::kFp32, blocks ? Shape{E, KB, NB} : Shape{E, K});
    const Poisoned only(DType::kE4m3, {E, N, K});
    QuantStats stats;
    quantize_weight(ctx, w, kind, pow2, part_rows, {codes, scales, scaling},
                    {codes_t, scales_t, scaling}, &stats);
    quantize_weight(ctx, w, kind, pow2, part_rows, {only, scales, scaling}, {}, nullptr);
    EXPECT_TRUE(bytes_equal(only, codes));
    EXPECT_TRUE(codes.guards_intact() && codes_t.guards_intact() && scales.guards_intact() &&
                scales_t.guards_intact());
    expect_stats(stats, want.stats);
    std::int64_t different = 0, transposed = 0;
    for (std::int64_t e = 0; e < E; ++e)
      for (std::int64_t n = 0; n < N; ++n)
        for (std::int64_t k = 0; k < K; ++k) {
          const std::int64_t i = (e * N + n) * K + k, t = (e * K + k) * N + n;
          const float* s = scales.view().as<float>();
          const float* s_t = scales_t.view().as<float>();
          different += codes.view().fp8()[i] != want.codes[index(i)] ||
                       codes_t.view().fp8()[t] != want_t.codes[index(i)];
          different += s[blocks ? (e * NB + n / 128) * KB + k / 128 : e * N + n] !=
                       want.scales[block[index(i)]];
          different += s_t[blocks ? (e * KB + k / 128) * NB + n / 128 : e * K + k] !=
                       want_t.scales[block_t[index(i)]];
          transposed += codes.view().fp8()[i] != codes_t.view().fp8()[t];
        }
    EXPECT_EQ(different, 0);
    if (blocks || (kind == WeightScales::kPerTensor && parts == 1)) {
      EXPECT_EQ(transposed, 0);
    }
    const Poisoned back(DType::kBf16, {E, N, K});
    dequantize_weight(ctx, {codes, scales, scaling}, back);
    EXPECT_TRUE(back.guards_intact() && back.all_written());
    for (std::int64_t i = 0; i < E * N * K; ++i) {
      const auto code = static_cast<float>(get_value(codes, i));
      ASSERT_EQ(back.view().as<Bf16>()[i], numerics::to_bf16(code * want.scales[block[index(i)]]));
    }
  });
}

TEST(Quantize, WeightsFollowTheContract) {
  Rng rng(6);
  for (const WeightScales kind :
       {WeightScales::kBlock128, WeightScales::kPerRow, WeightScales::kPerTensor})
    for (const bool pow2 : {false, true}) {
      check_weight(rng, 2, 256, 129, kind, {128, 128}, pow2);
      check_weight(rng, 2, 512, 33, kind, {256, 128, 128}, pow2);
      check_weight(rng, 1, 127, 33, kind, {}, pow2);
      check_weight(rng, 3, 1, 1, kind, {}, pow2);
      check_weight(rng, 1, 130, 200, kind, {}, pow2);
      check_weight(rng, 0, 128, 16, kind, {}, pow2);
    }
}

TEST(Quantize, WrongArgumentsAreNamed) {
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const Tensor x = empty(DType::kBf16, {4, 200});
  const RowOutput wrong(4, 201, Scaling::kBlock);
  EXPECT_THROW(quantize_rows(ctx, x, false, wrong.rows, nullptr), base::ContractError);
  EXPECT_THROW(quantize_rows(ctx, empty(DType::kFp32, {4, 201}), false, wrong.rows, nullptr),
               base::ContractError);
  const Tensor codes = empty(DType::kE4m3, {200, 128}), scales = empty(DType::kFp32, {1, 200});
  const Tensor zero_four = int32_tensor({0, 4}), five = int32_tensor({0, 5});
  const Tensor full = int32_tensor({0, 128}), ragged = int32_tensor({0, 100});
  const Fp8Columns out{codes, scales, Scaling::kBlock};
  quantize_columns(ctx, x, {zero_four, full}, false, out, nullptr);
  EXPECT_THROW(quantize_columns(ctx, x, {five, full}, false, out, nullptr), base::ContractError);
  EXPECT_THROW(quantize_columns(ctx, x, {zero_four, ragged}, false, out, nullptr),
               base::ContractError);
}

}  // namespace
}  // namespace lockstep::ops::test

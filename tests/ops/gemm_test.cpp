#include "ops/gemm.h"

#include <algorithm>

#include "gemm_model.h"

namespace lockstep::ops::test {
namespace {

using numerics::Bf16;
using numerics::Fp8;

Tensor scales(Rng& rng, const Shape& shape, double size = 1) {
  Tensor out = empty(DType::kFp32, shape);
  for (std::int64_t i = 0; i < shape.count(); ++i)
    out.as<float>()[i] = static_cast<float>(
        size * std::ldexp(uniform(rng, 1.0, 2.0), static_cast<int>(uniform_int(rng, -12, 3))));
  return out;
}

std::vector<std::int32_t> padded_offsets(const std::vector<std::int32_t>& offsets) {
  std::vector<std::int32_t> out{0};
  for (std::size_t e = 0; e + 1 < offsets.size(); ++e)
    out.push_back(out.back() + (offsets[e + 1] - offsets[e] + 127) / 128 * 128);
  return out;
}

struct Fp8Case {
  Tensor a, b, sa, sb, offsets;
  Scaling scaling;
  Fp8Rows rows() const { return {a, sa, scaling}; }
  Fp8Weight weight() const { return {b, sb, scaling}; }
  Shape output() const { return {a.view().dim(0), b.view().dim(1)}; }
};

Fp8Case fp8_case(Rng& rng, std::int64_t N, std::int64_t K, const std::vector<std::int32_t>& offsets,
                 Scaling scaling, DType a_type = DType::kE4m3, DType b_type = DType::kE4m3) {
  const std::int64_t E = static_cast<std::int64_t>(offsets.size()) - 1, M = offsets.back();
  const std::int64_t G = (K + 127) / 128;
  const bool block = scaling == Scaling::kBlock;
  return {wide(rng, a_type, {M, K}),
          wide(rng, b_type, {E, N, K}),
          scales(rng, block ? Shape{G, M} : Shape{M}),
          scales(rng, block ? Shape{E, (N + 127) / 128, G} : Shape{E, N}),
          int32_tensor(offsets),
          scaling};
}

// Runs `op(ctx, output)` on every instruction set and 1 and 2 threads and compares with `model`.
template <typename Op>
void expect_model(const TensorView& expected, Op op, const TensorView& start = {}) {
  for (const Isa isa : supported_isas())
    for (const int threads : {1, 2}) {
      tensor::Arena arena;
      Poisoned d(expected.dtype, expected.shape);
      if (start) std::memcpy(d.view().data, start.data, start.bytes());
      op(context(arena, isa, threads), d.view());
      EXPECT_TRUE(bytes_equal(d, expected)) << tensor::isa_name(isa) << " threads " << threads;
      EXPECT_TRUE(d.guards_intact());
    }
}

void expect_fp8(const Fp8Case& c, DType out = DType::kFp32, bool grouped = true) {
  const TensorView offsets = grouped ? c.offsets.view() : TensorView{};
  const Tensor expected = empty(out, c.output());
  model_fp8_gemm(c.rows(), c.weight(), offsets, expected);
  expect_model(expected, [&](const Context& ctx, const TensorView& d) {
    fp8_gemm(ctx, c.rows(), c.weight(), offsets, d);
  });
}

TEST(Fp8Gemm, EqualsScalarModelOnRaggedSizes) {
  Rng rng(1);
  for (const Scaling scaling : {Scaling::kBlock, Scaling::kRow}) {
    for (const std::int64_t K : {1, 15, 31, 32, 33, 127, 128, 129, 300})
      expect_fp8(fp8_case(rng, 21, K, {0, 3}, scaling));
    for (const std::int64_t N : {1, 15, 16, 17, 63, 64, 65, 130})
      expect_fp8(fp8_case(rng, N, 130, {0, 2}, scaling), DType::kBf16);
    for (const std::int32_t M : {0, 1, 2, 255, 257})
      expect_fp8(fp8_case(rng, 5, 40, {0, M}, scaling), DType::kFp32, false);
  }
  expect_fp8(fp8_case(rng, 5, 0, {0, 3}, Scaling::kBlock));
  expect_fp8(fp8_case(rng, 0, 7, {0, 3}, Scaling::kBlock));
}

// (Large enough that two threads share the work.)
TEST(Fp8Gemm, EqualsScalarModelOverExperts) {
  Rng rng(2);
  for (const Scaling scaling : {Scaling::kBlock, Scaling::kRow})
    expect_fp8(fp8_case(rng, 100, 160, {0, 0, 1, 34, 34, 40, 40}, scaling));
}

TEST(Fp8Gemm, EqualsScalarModelWithE5m2) {
  Rng rng(3);
  for (const DType a : {DType::kE4m3, DType::kE5m2})
    for (const DType b : {DType::kE4m3, DType::kE5m2}) {
      Fp8Case c = fp8_case(rng, 33, 200, {0, 4}, Scaling::kBlock, a, b);
      c.a = wide(rng, a, {4, 200}, {0.1, -17, 15});
      c.b = wide(rng, b, {1, 33, 200}, {0.1, -17, 15});
      expect_fp8(c);
    }
}

// All codes against all codes, one product at a time and in sums.
TEST(Fp8Gemm, EqualsScalarModelOnAllPairsOfCodes) {
  for (const std::int64_t K : {1, 7}) {
    Fp8Case c;
    c.a = empty(DType::kE4m3, {256, K});
    c.b = empty(DType::kE4m3, {1, 256, K});
    for (std::int64_t i = 0; i < 256; ++i)
      for (std::int64_t k = 0; k < K; ++k)
        c.a.view().fp8()[i * K + k] = c.b.view().fp8()[i * K + k] =
            static_cast<Fp8>(i * (k + 1) + 31 * k);
    Rng rng(4);
    c.sa = scales(rng, {256});
    c.sb = scales(rng, {1, 256});
    c.offsets = int32_tensor({0, 256});
    c.scaling = Scaling::kRow;
    expect_fp8(c);
  }
}

TEST(Fp8Gemm, NonfiniteOperandsAndScales) {
  Rng rng(5);
  Fp8Case c = fp8_case(rng, 20, 300, {0, 6}, Scaling::kBlock);
  c.a.view().fp8()[1 * 300 + 40] = 0x7F;
  c.a.view().fp8()[2 * 300 + 299] = 0xFF;
  c.b.view().fp8()[7 * 300 + 200] = 0x7F;
  for (std::int64_t m = 0; m < 6; ++m) c.a.view().fp8()[m * 300 + 200] = 0;  // 0 * NaN
  c.sa.as<float>()[0 * 6 + 3] = std::numeric_limits<float>::quiet_NaN();
  c.sa.as<float>()[1 * 6 + 4] = std::numeric_limits<float>::infinity();
  expect_fp8(c);
  expect_fp8(c, DType::kBf16);
  tensor::Arena arena;
  Poisoned d(DType::kFp32, c.output());
  fp8_gemm(context(arena, tensor::best_isa()), c.rows(), c.weight(), {}, d);
  for (std::int64_t m = 0; m < 6; ++m)
    for (std::int64_t n = 0; n < 20; ++n)
      if (m == 1 || m == 2 || m == 3 || n == 7) {
        EXPECT_TRUE(std::isnan(get_value(d, m * 20 + n))) << m << " " << n;
      }
}

// A row's result does not depend on the rows that travel with it.
TEST(Fp8Gemm, RowAloneEqualsRowAmongOthers) {
  Rng rng(6);
  const std::int64_t M = 66, N = 100, K = 150;
  const Fp8Case c = fp8_case(rng, N, K, {0, 66}, Scaling::kBlock);
  tensor::Arena arena;
  const Context ctx = context(arena, tensor::best_isa(), 2);
  Poisoned all(DType::kFp32, {M, N});
  fp8_gemm(ctx, c.rows(), c.weight(), {}, all);
  for (std::int64_t m = 0; m < M; ++m) {
    Tensor sa = empty(DType::kFp32, {2, 1});
    for (std::int64_t g = 0; g < 2; ++g) sa.as<float>()[g] = c.sa.as<float>()[g * M + m];
    Poisoned one(DType::kFp32, {1, N});
    fp8_gemm(ctx, {c.a.view().rows(m, 1), sa, c.scaling}, c.weight(), {}, one);
    EXPECT_TRUE(bytes_equal(one, all.view().rows(m, 1))) << m;
  }
}

// Against the product in double. Per step every one of the 33 terms and the result lose at most a
// unit of 2^(X-13) <= 2^-13 * 2^X; the terms and C are below 4 * 2^X <= 4 * sum |a b| of the block.
TEST(Fp8Gemm, NearTheProductInDouble) {
  Rng rng(7);
  const std::int64_t M = 5, N = 40, K = 290;
  const Fp8Case c = fp8_case(rng, N, K, {0, 5}, Scaling::kBlock);
  tensor::Arena arena;
  Poisoned d(DType::kFp32, {M, N});
  fp8_gemm(context(arena, tensor::best_isa()), c.rows(), c.weight(), {}, d);
  for (std::int64_t m = 0; m < M; ++m)
    for (std::int64_t n = 0; n < N; ++n) {
      double exact = 0, bound = 0;
      for (std::int64_t g = 0; g * 128 < K; ++g) {
        double block = 0, size = 0;
        for (std::int64_t k = g * 128; k < std::min<std::int64_t>(K, g * 128 + 128); ++k) {
          const double p = get_value(c.a, m * K + k) * get_value(c.b, n * K + k);
          block += p;
          size += std::abs(p);
        }
        const double scale = static_cast<double>(c.sa.as<float>()[g * M + m]) * c.sb.as<float>()[g];
        exact += block * scale;
        // Four steps: 33 truncated terms each of a unit, the result's own truncation below 2^-13 of
        // its size; X <= log2 of the largest term or of C, both at most `size` (1 + 2^-10).
        bound += scale * size * (4 * 34 * 0x1p-13 * 1.01) + 0x1p-21 * scale * size;
      }
      const double err = std::abs(get_value(d, m * N + n) - exact);
      EXPECT_LE(err, bound + 0x1p-22 * std::abs(exact)) << m << " " << n;
    }
}

TEST(Fp8Gemm, RejectsWrongArguments) {
  Rng rng(8);
  const Fp8Case c = fp8_case(rng, 20, 130, {0, 3, 6}, Scaling::kBlock);
  tensor::Arena arena;
  const Context ctx = context(arena, Isa::kPortable);
  const Tensor d = empty(DType::kFp32, {6, 20});
  EXPECT_NO_THROW(fp8_gemm(ctx, c.rows(), c.weight(), c.offsets, d));
  EXPECT_THROW(fp8_gemm(ctx, c.rows(), c.weight(), {}, d), base::ContractError);
  EXPECT_THROW(fp8_gemm(ctx, c.rows(), c.weight(), int32_tensor({0, 3, 7}), d),
               base::ContractError);
  EXPECT_THROW(fp8_gemm(ctx, c.rows(), c.weight(), int32_tensor({0, 7, 6}), d),
               base::ContractError);
  EXPECT_THROW(fp8_gemm(ctx, {c.a, c.sa, Scaling::kRow}, c.weight(), c.offsets, d),
               base::ContractError);
  EXPECT_THROW(fp8_gemm(ctx, c.rows(), c.weight(), c.offsets, empty(DType::kFp32, {6, 21})),
               base::ContractError);
  EXPECT_THROW(fp8_gemm(ctx, c.rows(), c.weight(), c.offsets, empty(DType::kInt32, {6, 20})),
               base::ContractError);
  const Tensor transposed = scales(rng, {6, 2});
  EXPECT_THROW(fp8_gemm(ctx, {c.a, transposed}, c.weight(), c.offsets, d), base::ContractError);
}

TEST(Fp8WeightGradient, EqualsScalarModel) {
  Rng rng(9);
  const std::vector<std::int32_t> offsets{0, 0, 1, 130, 130, 161};
  const std::vector<std::int32_t> padded = padded_offsets(offsets);
  const std::int64_t E = 5, N = 19, K = 70, R = padded.back() + 128;
  for (const Scaling scaling : {Scaling::kBlock, Scaling::kRow})
    for (const bool accumulate : {false, true}) {
      const bool block = scaling == Scaling::kBlock;
      const Tensor dy = wide(rng, DType::kE4m3, {N, R}), x = wide(rng, DType::kE4m3, {K, R});
      for (std::int64_t e = 0; e < E; ++e)
        for (std::int64_t r = padded[e] + offsets[e + 1] - offsets[e]; r < padded[e + 1]; ++r) {
          for (std::int64_t n = 0; n < N; ++n) dy.view().fp8()[n * R + r] = 0;
          for (std::int64_t k = 0; k < K; ++k) x.view().fp8()[k * R + r] = 0;
        }
      const Tensor sx = scales(rng, {block ? R / 128 : E, K}),
                   sdy = scales(rng, {block ? R / 128 : E, N});
      const Tensor o = int32_tensor(offsets), p = int32_tensor(padded);
      const Segments held{o, p};
      const Tensor start = random_normal(rng, DType::kFp32, {E, N, K});
      const Tensor expected = empty(DType::kFp32, {E, N, K});
      std::memcpy(expected.view().data, start.view().data, start.view().bytes());
      const Fp8Columns fdy{dy, sdy, scaling}, fx{x, sx, scaling};
      model_fp8_weight_gradient(fdy, fx, held, accumulate, expected);
      expect_model(
          expected,
          [&](const Context& ctx, const TensorView& d) {
            fp8_weight_gradient(ctx, fdy, fx, held, accumulate, d);
          },
          accumulate ? start.view() : TensorView{});
    }
}

// Products too small for FP32 are -0 as often as +0; written they are +0, as if added to zeros.
TEST(Fp8WeightGradient, WritesWhatAddingToZerosGives) {
  Rng rng(19);
  const std::int64_t E = 2, N = 19, K = 70, R = 256;
  const Tensor o = int32_tensor({0, 5, 5}), p = int32_tensor({0, 128, 128});
  for (const Scaling scaling : {Scaling::kBlock, Scaling::kRow}) {
    const std::int64_t rows = scaling == Scaling::kBlock ? R / 128 : E;
    const Tensor dy = wide(rng, DType::kE4m3, {N, R}), x = wide(rng, DType::kE4m3, {K, R});
    const Tensor sdy = scales(rng, {rows, N}, 0x1p-72), sx = scales(rng, {rows, K}, 0x1p-72);
    const auto gradient = [&](const Context& ctx, bool accumulate, const TensorView& d) {
      fp8_weight_gradient(ctx, {dy, sdy, scaling}, {x, sx, scaling}, {o, p}, accumulate, d);
    };
    tensor::Arena arena;
    const Tensor sums = empty(DType::kFp32, {E, N, K});
    const auto fill = [&](const Tensor& t, float value) {
      std::fill_n(t.as<float>(), t.view().count(), value);
    };
    fill(sums, -0.0f);
    gradient(context(arena, Isa::kPortable), true, sums);
    EXPECT_GT(std::count_if(sums.as<float>(), sums.as<float>() + N * K,
                            [](float v) { return v == 0 && std::signbit(v); }),
              0);
    fill(sums, 0.0f);
    gradient(context(arena, Isa::kPortable), true, sums);
    expect_model(sums, [&](const Context& ctx, const TensorView& d) { gradient(ctx, false, d); });
  }
}

void expect_bf16(Rng& rng, std::int64_t N, std::int64_t K, const std::vector<std::int32_t>& offsets,
                 const Mix& mix, DType out = DType::kFp32) {
  const std::int64_t E = static_cast<std::int64_t>(offsets.size()) - 1, M = offsets.back();
  const Tensor a = wide(rng, DType::kBf16, {M, K}, mix), o = int32_tensor(offsets);
  for (const BLayout layout : {BLayout::kNK, BLayout::kKN}) {
    const Tensor b =
        wide(rng, DType::kBf16, layout == BLayout::kNK ? Shape{E, N, K} : Shape{E, K, N}, mix);
    const Tensor expected = empty(out, {M, N});
    model_bf16_gemm(a, b, layout, o, expected);
    expect_model(expected, [&](const Context& ctx, const TensorView& d) {
      bf16_gemm(ctx, a, b, layout, o, d);
    });
  }
}

TEST(Bf16Gemm, EqualsScalarModelOnRaggedSizes) {
  Rng rng(10);
  for (const std::int64_t K : {0, 1, 15, 16, 17, 31, 33, 127, 129})
    expect_bf16(rng, 21, K, {0, 3}, {0.1, -20, 20});
  for (const std::int64_t N : {0, 1, 7, 8, 9, 31, 32, 33, 63, 65})
    expect_bf16(rng, N, 50, {0, 2}, {0.1, -3, 3}, DType::kBf16);
  for (const std::int32_t M : {0, 1, 2, 255, 257}) expect_bf16(rng, 5, 20, {0, M}, {});
}

// (Large enough that two threads share the work.)
TEST(Bf16Gemm, EqualsScalarModelOverExperts) {
  Rng rng(11);
  expect_bf16(rng, 130, 110, {0, 0, 1, 34, 34, 40, 40}, {});
}

// Exponents at both ends: subnormal operands and results, underflow to +0,
// overflow to infinity and NaN in the step after it.
TEST(Bf16Gemm, EqualsScalarModelAtTheEndsOfTheRange) {
  Rng rng(12);
  expect_bf16(rng, 40, 40, {0, 12}, {0.2, -133, -120});
  expect_bf16(rng, 40, 40, {0, 12}, {0.2, -133, 0});
  expect_bf16(rng, 40, 40, {0, 12}, {0.2, -85, -60});
  expect_bf16(rng, 40, 80, {0, 12}, {0.2, 55, 66});
  expect_bf16(rng, 40, 80, {0, 12}, {0.2, 100, 127});
  expect_bf16(rng, 40, 80, {0, 12}, {0.9, -133, 127});
}

TEST(Bf16Gemm, NonfiniteOperands) {
  Rng rng(13);
  const Tensor a = wide(rng, DType::kBf16, {5, 70}), b = wide(rng, DType::kBf16, {1, 9, 70});
  a.as<Bf16>()[1 * 70 + 3] = {0x7F80};
  a.as<Bf16>()[2 * 70 + 69] = {0xFFC0};
  b.as<Bf16>()[4 * 70 + 20] = {0xFF80};
  for (std::int64_t m = 0; m < 5; ++m) a.as<Bf16>()[m * 70 + 20] = {0};
  const Tensor expected = empty(DType::kFp32, {5, 9});
  model_bf16_gemm(a, b, BLayout::kNK, {}, expected);
  for (std::int64_t i = 0; i < 45; ++i)
    EXPECT_EQ(std::isnan(get_value(expected, i)), i / 9 == 1 || i / 9 == 2 || i % 9 == 4);
  expect_model(expected, [&](const Context& ctx, const TensorView& d) {
    bf16_gemm(ctx, a, b, BLayout::kNK, {}, d);
  });
}

TEST(Bf16Gemm, RowAloneEqualsRowAmongOthers) {
  Rng rng(14);
  const Tensor a = wide(rng, DType::kBf16, {33, 90}), b = wide(rng, DType::kBf16, {1, 70, 90});
  tensor::Arena arena;
  const Context ctx = context(arena, tensor::best_isa(), 2);
  Poisoned all(DType::kFp32, {33, 70});
  bf16_gemm(ctx, a, b, BLayout::kNK, {}, all);
  for (std::int64_t m = 0; m < 33; ++m) {
    Poisoned one(DType::kFp32, {1, 70});
    bf16_gemm(ctx, a.view().rows(m, 1), b, BLayout::kNK, {}, one);
    EXPECT_TRUE(bytes_equal(one, all.view().rows(m, 1))) << m;
  }
}

// Against the product in double: a step truncates 17 terms at 2^(X-25) and its result at 2^-23 of
// its size, all at most sum |a b| (1 + 2^-10) =: S; every 2^X <= S.
TEST(Bf16Gemm, NearTheProductInDouble) {
  Rng rng(15);
  const std::int64_t K = 170;
  const Tensor a = wide(rng, DType::kBf16, {6, K}), b = wide(rng, DType::kBf16, {1, 40, K});
  tensor::Arena arena;
  Poisoned d(DType::kFp32, {6, 40});
  bf16_gemm(context(arena, tensor::best_isa()), a, b, BLayout::kNK, {}, d);
  for (std::int64_t m = 0; m < 6; ++m)
    for (std::int64_t n = 0; n < 40; ++n) {
      double exact = 0, size = 0;
      for (std::int64_t k = 0; k < K; ++k) {
        const double p = get_value(a, m * K + k) * get_value(b, n * K + k);
        exact += p;
        size += std::abs(p);
      }
      const double steps = std::ceil(static_cast<double>(K) / 16);
      EXPECT_LE(std::abs(get_value(d, m * 40 + n) - exact),
                steps * size * 1.001 * (17 * 0x1p-25 + 0x1p-23));
    }
}

TEST(Bf16WeightGradient, EqualsScalarModel) {
  Rng rng(16);
  const std::vector<std::int32_t> offsets{0, 0, 1, 50, 50, 97};
  const Tensor o = int32_tensor(offsets);
  const std::int64_t E = 5, N = 19, K = 70, M = 97;
  for (const bool accumulate : {false, true}) {
    const Tensor dy = wide(rng, DType::kBf16, {M, N}), x = wide(rng, DType::kBf16, {M, K});
    const Tensor start = random_normal(rng, DType::kFp32, {E, N, K});
    const Tensor expected = empty(DType::kFp32, {E, N, K});
    std::memcpy(expected.view().data, start.view().data, start.view().bytes());
    model_bf16_weight_gradient(dy, x, o, accumulate, expected);
    expect_model(
        expected,
        [&](const Context& ctx, const TensorView& d) {
          bf16_weight_gradient(ctx, dy, x, o, accumulate, d);
        },
        accumulate ? start.view() : TensorView{});
  }
}

TEST(Bf16WeightGradient, ChainsAreAddedOneAfterTheOther) {
  Rng rng(20);
  const std::int64_t E = 4, N = 19, K = 70, M = 400;
  const std::vector<std::int32_t> offsets{0, 0, 64, 257, 400};
  const Tensor o = int32_tensor(offsets), dy = wide(rng, DType::kBf16, {M, N}),
               x = wide(rng, DType::kBf16, {M, K}),
               start = random_normal(rng, DType::kFp32, {E, N, K});
  tensor::Arena arena;
  const Context ctx = context(arena, Isa::kPortable);
  for (const bool accumulate : {false, true}) {
    const Tensor expected = empty(DType::kFp32, {E, N, K});
    std::memcpy(expected.view().data, start.view().data, start.view().bytes());
    for (std::int64_t e = 0; e < E; ++e) {
      const TensorView d = expected.view().rows(e, 1);
      std::int64_t begin = offsets[e];
      do {
        const std::int64_t count = std::min<std::int64_t>(128, offsets[e + 1] - begin);
        bf16_weight_gradient(ctx, dy.view().rows(begin, count), x.view().rows(begin, count), {},
                             accumulate || begin > offsets[e], d);
        begin += 128;
      } while (begin < offsets[e + 1]);
    }
    expect_model(
        expected,
        [&](const Context& any, const TensorView& d) {
          bf16_weight_gradient(any, dy, x, o, accumulate, d, 128);
        },
        accumulate ? start.view() : TensorView{});
  }
  EXPECT_THROW(bf16_weight_gradient(ctx, dy, x, o, true, start, 100), base::ContractError);
}

}  // namespace
}  // namespace lockstep::ops::test

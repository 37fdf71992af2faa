// The quantizers of the GPU against the CPU's, by bytes: codes, scales and counters.
#include "ops/quantize.h"

#include "gpu/quant_case.h"
#include "ops/permute_quantize.h"

namespace lockstep::ops::test {
namespace {

using QuantizeGpu = QuantGpuTest;

const std::vector<std::int64_t> kWidths{1, 7, 8, 16, 127, 128, 129, 136, 200, 256, 1000};

TEST_F(QuantizeGpu, Rows) {
  Rng rng(1);
  std::vector<std::pair<std::int64_t, std::int64_t>> sizes;
  for (const std::int64_t M : {0, 1, 2, 37, 127, 128, 129, 300})
    for (const std::int64_t K : kWidths) sizes.push_back({M, K});
  // Rows on several warps, and those that are too wide for them.
  for (const std::int64_t K : {1024, 1032, 2048, 7168, 16384, 16392}) sizes.push_back({17, K});
  sizes.push_back({9001, 264});
  sizes.push_back({9001, 1032});
  for (const auto& [rows_M, width_K] : sizes) {
    const std::int64_t M = rows_M, K = width_K;
    const Tensor x = varied_bf16(rng, {M, K}, K > 1);
    const TensorView x_gpu = on_gpu(x);
    for_all_modes([&](Scaling scaling, bool pow2, bool counted, const std::string& mode) {
      const std::string what = fmt::format("M {} K {} {}", M, K, mode);
      const RowsPair out = rows(M, K, scaling);
      StatsPair s = stats(mode_ % 2 == 0);
      quantize_rows(cpu, x, pow2, out.cpu, counted ? &s.cpu : nullptr);
      quantize_rows(gpu, x_gpu, pow2, out.gpu, counted ? s.on_gpu() : nullptr);
      expect_same(out, what);
      expect_same(s, what);
    });
  }
}

// Every BF16 value as a block of its own, and under scales that a larger neighbour sets.
TEST_F(QuantizeGpu, EveryBf16) {
  const Tensor own = empty(DType::kBf16, {65536, 1});
  for (std::int64_t i = 0; i < 65536; ++i)
    own.as<numerics::Bf16>()[i].bits = static_cast<std::uint16_t>(i);
  std::vector<Tensor> inputs{own};
  for (const std::uint16_t anchor : {0x0001, 0x0080, 0x0D80, 0x3F80, 0x4049, 0x7F7F}) {
    const Tensor x = empty(DType::kBf16, {1024, 72});
    for (std::int64_t i = 0; i < 65536; ++i) {
      const auto bits = static_cast<std::uint16_t>(i);
      x.as<numerics::Bf16>()[i / 64 * 72 + 8 + i % 64].bits =
          (bits & 0x7FFF) <= anchor ? bits : anchor;
    }
    for (std::int64_t m = 0; m < 1024; ++m) x.as<numerics::Bf16>()[m * 72 + m % 8].bits = anchor;
    inputs.push_back(x);
  }
  for (const Tensor& x : inputs)
    for (const bool pow2 : {false, true}) {
      const RowsPair out = rows(x.view().dim(0), x.view().dim(1), Scaling::kBlock);
      StatsPair s = stats(true);
      quantize_rows(cpu, x, pow2, out.cpu, &s.cpu);
      quantize_rows(gpu, on_gpu(x), pow2, out.gpu, s.on_gpu());
      expect_same(out, "every value");
      expect_same(s, "every value");
    }
}

TEST_F(QuantizeGpu, Columns) {
  Rng rng(2);
  for (const auto& counts : segment_cases())
    for (const std::int64_t N : kWidths) {
      const SegmentPair seg = segments(counts);
      const Tensor x = varied_bf16(rng, {seg.M + 2, N}, true);  // rows behind the segments
      const TensorView x_gpu = on_gpu(x);
      for_all_modes([&](Scaling scaling, bool pow2, bool counted, const std::string& mode) {
        const std::string what =
            fmt::format("segments {} N {} {}", fmt::join(counts, " "), N, mode);
        const ColumnsPair out = columns(N, seg, scaling, mode_ % 3 * 128);
        StatsPair s = stats(mode_ % 2 == 0);
        quantize_columns(cpu, x, seg.cpu, pow2, out.cpu, counted ? &s.cpu : nullptr);
        quantize_columns(gpu, x_gpu, seg.gpu, pow2, out.gpu, counted ? s.on_gpu() : nullptr);
        expect_same(out, what);
        expect_same(s, what);
      });
    }
}

TEST_F(QuantizeGpu, RowsAndColumns) {
  Rng rng(3);
  for (const auto& counts : segment_cases())
    for (const std::int64_t N : kWidths) {
      const SegmentPair seg = segments(counts);
      const Tensor x = varied_bf16(rng, {seg.M, N}, true);
      const TensorView x_gpu = on_gpu(x);
      for_all_modes([&](Scaling scaling, bool pow2, bool counted, const std::string& mode) {
        const std::string what =
            fmt::format("segments {} N {} {}", fmt::join(counts, " "), N, mode);
        const RowsPair row = rows(seg.M, N, scaling);
        const ColumnsPair column = columns(N, seg, scaling, mode_ % 3 * 128);
        StatsPair s = stats(mode_ % 2 == 0);
        quantize_rows_columns(cpu, x, seg.cpu, pow2, row.cpu, column.cpu,
                              counted ? &s.cpu : nullptr);
        quantize_rows_columns(gpu, x_gpu, seg.gpu, pow2, row.gpu, column.gpu,
                              counted ? s.on_gpu() : nullptr);
        expect_same(row, what);
        expect_same(column, what);
        expect_same(s, what);
      });
    }
}

TEST_F(QuantizeGpu, PermuteQuantize) {
  Rng rng(4);
  const std::int64_t T = 61;
  for (const auto& counts : segment_cases())
    for (const std::int64_t D : {7, 128, 200, 384, 1160}) {
      const SegmentPair seg = segments(counts);
      const Tensor h = varied_bf16(rng, {T, D}, true), token = empty(DType::kInt32, {seg.M});
      for (std::int64_t i = 0; i < seg.M; ++i)
        token.as<std::int32_t>()[i] = static_cast<std::int32_t>(uniform_int(rng, 0, T - 1));
      const TensorView h_gpu = on_gpu(h), token_gpu = on_gpu(token);
      for_all_modes([&](Scaling scaling, bool pow2, bool counted, const std::string& mode) {
        const bool with_columns = mode_ % 5 != 0;
        const std::string what =
            fmt::format("segments {} D {} {}", fmt::join(counts, " "), D, mode);
        const RowsPair row = rows(seg.M, D, scaling);
        const ColumnsPair column = columns(D, seg, scaling, mode_ % 3 * 128);
        StatsPair s = stats(mode_ % 2 == 0);
        permute_quantize(cpu, h, token, seg.cpu, pow2, row.cpu,
                         with_columns ? &column.cpu : nullptr, counted ? &s.cpu : nullptr);
        permute_quantize(gpu, h_gpu, token_gpu, seg.gpu, pow2, row.gpu,
                         with_columns ? &column.gpu : nullptr, counted ? s.on_gpu() : nullptr);
        expect_same(row, what);
        expect_same(column, what);
        expect_same(s, what);
      });
    }
}

struct WeightCase {
  std::int64_t E, N, K;
  std::vector<std::int64_t> parts;
};

TEST_F(QuantizeGpu, Weights) {
  Rng rng(5);
  const std::vector<WeightCase> cases{{2, 256, 129, {128, 128}}, {2, 512, 40, {256, 128, 128}},
                                      {1, 127, 33, {}},          {3, 1, 1, {}},
                                      {1, 130, 200, {}},         {0, 128, 16, {}},
                                      {2, 384, 256, {256, 128}}, {1, 16, 8, {}},
                                      {2, 144, 136, {}},         {5, 128, 128, {}},
                                      {1, 100, 384, {50, 50}}};
  for (const WeightCase& c : cases)
    for (const WeightScales kind :
         {WeightScales::kBlock128, WeightScales::kPerRow, WeightScales::kPerTensor})
      for (const bool pow2 : {false, true})
        for (const bool nonfinite : {false, true}) {
          const bool blocks = kind == WeightScales::kBlock128;
          if (left_out(7)) continue;
          const std::int64_t NB = (c.N + 127) / 128, KB = (c.K + 127) / 128;
          const std::string what = fmt::format("E {} N {} K {} kind {} pow2 {} nonfinite {}", c.E,
                                               c.N, c.K, static_cast<int>(kind), pow2, nonfinite);
          const Scaling scaling = blocks ? Scaling::kBlock : Scaling::kRow;
          const Tensor w = varied_bf16(rng, {c.E, c.N, c.K}, nonfinite);
          const TensorView w_gpu = on_gpu(w);
          const Shape s_shape = blocks ? Shape{c.E, NB, KB} : Shape{c.E, c.N};
          const Shape t_shape = blocks ? Shape{c.E, KB, NB} : Shape{c.E, c.K};
          const Tensor codes = cpu_output(DType::kE4m3, {c.E, c.N, c.K}),
                       codes_t = cpu_output(DType::kE4m3, {c.E, c.K, c.N}),
                       scales = cpu_output(DType::kFp32, s_shape),
                       scales_t = cpu_output(DType::kFp32, t_shape);
          StatsPair s = stats(pow2);
          quantize_weight(cpu, w, kind, pow2, c.parts, {codes, scales, scaling},
                          {codes_t, scales_t, scaling}, &s.cpu);
          for (const bool both : {true, false}) {
            const Fp8Weight out{gpu_output(DType::kE4m3, {c.E, c.N, c.K}),
                                gpu_output(DType::kFp32, s_shape), scaling};
            const Fp8Weight out_t{gpu_output(DType::kE4m3, {c.E, c.K, c.N}),
                                  gpu_output(DType::kFp32, t_shape), scaling};
            quantize_weight(gpu, w_gpu, kind, pow2, c.parts, out, both ? out_t : Fp8Weight{},
                            both ? s.on_gpu() : nullptr);
            expect_same(codes, out.codes_ENK, what + " codes");
            expect_same(scales, out.scales, what + " scales");
            const Tensor back = cpu_output(DType::kBf16, {c.E, c.N, c.K});
            const TensorView back_gpu = gpu_output(DType::kBf16, {c.E, c.N, c.K});
            dequantize_weight(cpu, {codes, scales, scaling}, back);
            dequantize_weight(gpu, out, back_gpu);
            expect_same(back, back_gpu, what + " dequantized");
            if (!both) continue;
            expect_same(codes_t, out_t.codes_ENK, what + " transposed codes");
            expect_same(scales_t, out_t.scales, what + " transposed scales");
            expect_same(s, what);
          }
        }
}

TEST_F(QuantizeGpu, DequantizeRows) {
  Rng rng(6);
  for (const std::int64_t M : {0, 1, 129})
    for (const std::int64_t K : {1, 8, 127, 136, 512})
      for (const Scaling scaling : {Scaling::kBlock, Scaling::kRow}) {
        const RowsPair x = rows(M, K, scaling);
        for (std::int64_t i = 0; i < M * K; ++i)  // every code, NaN among them
          x.codes.view().fp8()[i] = static_cast<numerics::Fp8>(rng());
        for (std::int64_t i = 0; i < x.scales.view().count(); ++i)
          x.scales.as<float>()[i] = std::ldexp(normal(rng), static_cast<int>(i % 40) - 20);
        const Fp8Rows x_gpu{on_gpu(x.codes), on_gpu(x.scales), scaling};
        const Tensor out = cpu_output(DType::kBf16, {M, K});
        const TensorView out_gpu = gpu_output(DType::kBf16, {M, K});
        dequantize_rows(cpu, x.cpu, out);
        dequantize_rows(gpu, x_gpu, out_gpu);
        expect_same(out, out_gpu, fmt::format("M {} K {}", M, K));
      }
}

// Sizes at which a CTA walks over several tiles.
TEST_F(QuantizeGpu, ManyTiles) {
  Rng rng(7);
  std::vector<std::int32_t> counts;
  for (int e = 0; e < 37; ++e)
    counts.push_back(static_cast<std::int32_t>(uniform_int(rng, 0, 400)));
  const SegmentPair seg = segments(counts);
  const std::int64_t N = 1024;
  const Tensor x = varied_bf16(rng, {seg.M, N}, true);
  const TensorView x_gpu = on_gpu(x);
  for_all_modes([&](Scaling scaling, bool pow2, bool counted, const std::string& mode) {
    const RowsPair row = rows(seg.M, N, scaling);
    const ColumnsPair column = columns(N, seg, scaling, 4736);
    StatsPair s = stats(false);
    quantize_rows_columns(cpu, x, seg.cpu, pow2, row.cpu, column.cpu, counted ? &s.cpu : nullptr);
    quantize_rows_columns(gpu, x_gpu, seg.gpu, pow2, row.gpu, column.gpu,
                          counted ? s.on_gpu() : nullptr);
    expect_same(row, mode);
    expect_same(column, mode);
    expect_same(s, mode);
  });
}

}  // namespace
}  // namespace lockstep::ops::test

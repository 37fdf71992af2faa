// SwiGLU of the GPU against the CPU's, by bytes.
#include "ops/swiglu.h"

#include "gpu/quant_case.h"

namespace lockstep::ops::test {
namespace {

using SwigluGpu = QuantGpuTest;
using numerics::Bf16;

// Gates and ups of moderate size, with zeros; non-finite ones where asked.
Tensor activations(Rng& rng, const Shape& shape, bool nonfinite) {
  Tensor x = random_normal(rng, DType::kBf16, shape, 4.0);
  for (std::int64_t i = 0; i < shape.count(); ++i) {
    const std::uint64_t r = rng();
    if (r % 50 == 0) x.as<Bf16>()[i].bits &= 0x8000;
    if (r % 97 == 0) x.as<Bf16>()[i] = numerics::to_bf16((r & 512) != 0 ? 120.0f : -120.0f);
    if (nonfinite && r % 3001 == 0) x.as<Bf16>()[i].bits = (r & 1024) != 0 ? 0x7F80 : 0xFFC1;
  }
  return x;
}

// Every gate: each alone in its row, so that the scale shows all bits of the FP32 product, and
// through the gradient.
TEST_F(SwigluGpu, EveryGate) {
  for (const std::uint16_t up : {0x3F80, 0xBF80, 0x4049, 0x0001, 0x7F7F, 0x0000, 0x7F80, 0x7FC0}) {
    const Tensor x = empty(DType::kBf16, {65536, 2}), d = empty(DType::kBf16, {65536, 1});
    for (std::int64_t i = 0; i < 65536; ++i) {
      x.as<Bf16>()[2 * i].bits = static_cast<std::uint16_t>(i);
      x.as<Bf16>()[2 * i + 1].bits = up;
      d.as<Bf16>()[i].bits = static_cast<std::uint16_t>(0x3F80 + i % 77);
    }
    const TensorView x_gpu = on_gpu(x), d_gpu = on_gpu(d);
    const RowsPair out = rows(65536, 1, Scaling::kBlock);
    StatsPair s = stats(true);
    const std::string what = fmt::format("up {:#06x}", up);
    swiglu_quantize(cpu, x, {}, false, out.cpu, nullptr, &s.cpu);
    swiglu_quantize(gpu, x_gpu, {}, false, out.gpu, nullptr, s.on_gpu());
    expect_same(out, what);
    expect_same(s, what);
    const Tensor a = cpu_output(DType::kBf16, {65536, 1}), g = cpu_output(DType::kBf16, {65536, 2});
    const TensorView a_gpu = gpu_output(DType::kBf16, {65536, 1}),
                     g_gpu = gpu_output(DType::kBf16, {65536, 2});
    swiglu(cpu, x, a);
    swiglu(gpu, x_gpu, a_gpu);
    expect_same(a, a_gpu, what + " swiglu");
    swiglu_backward(cpu, x, d, g);
    swiglu_backward(gpu, x_gpu, d_gpu, g_gpu);
    expect_same(g, g_gpu, what + " gradient");
  }
}

TEST_F(SwigluGpu, ForwardAndBackward) {
  Rng rng(1);
  for (const std::int64_t M : {0, 1, 5, 128, 131})
    for (const std::int64_t F : {0, 1, 7, 8, 128, 129, 384}) {
      const Tensor x = activations(rng, {M, 2 * F}, true), d = activations(rng, {M, F}, false);
      const TensorView x_gpu = on_gpu(x), d_gpu = on_gpu(d);
      const Tensor a = cpu_output(DType::kBf16, {M, F}), g = cpu_output(DType::kBf16, {M, 2 * F});
      const TensorView a_gpu = gpu_output(DType::kBf16, {M, F}),
                       g_gpu = gpu_output(DType::kBf16, {M, 2 * F});
      swiglu(cpu, x, a);
      swiglu(gpu, x_gpu, a_gpu);
      expect_same(a, a_gpu, fmt::format("swiglu M {} F {}", M, F));
      swiglu_backward(cpu, x, d, g);
      swiglu_backward(gpu, x_gpu, d_gpu, g_gpu);
      expect_same(g, g_gpu, fmt::format("swiglu_backward M {} F {}", M, F));
    }
}

TEST_F(SwigluGpu, Quantize) {
  Rng rng(2);
  for (const auto& counts : segment_cases())
    for (const std::int64_t F : {1, 8, 127, 128, 200, 256}) {
      const SegmentPair seg = segments(counts);
      const Tensor x = activations(rng, {seg.M, 2 * F}, true);
      const TensorView x_gpu = on_gpu(x);
      for_all_modes([&](Scaling scaling, bool pow2, bool counted, const std::string& mode) {
        const bool with_columns = mode_ % 5 != 0;
        const std::string what =
            fmt::format("segments {} F {} {}", fmt::join(counts, " "), F, mode);
        const RowsPair row = rows(seg.M, F, scaling);
        const ColumnsPair column = columns(F, seg, scaling, mode_ % 3 * 128);
        StatsPair s = stats(mode_ % 2 == 0);
        swiglu_quantize(cpu, x, seg.cpu, pow2, row.cpu, with_columns ? &column.cpu : nullptr,
                        counted ? &s.cpu : nullptr);
        swiglu_quantize(gpu, x_gpu, seg.gpu, pow2, row.gpu, with_columns ? &column.gpu : nullptr,
                        counted ? s.on_gpu() : nullptr);
        expect_same(row, what);
        expect_same(column, what);
        expect_same(s, what);
      });
    }
}

// So many that the sigmoids come from a table, rows on one warp and on several.
TEST_F(SwigluGpu, ManyRows) {
  Rng rng(4);
  for (const auto& [M, F] :
       {std::pair<std::int64_t, std::int64_t>{10923, 768}, {4081, 2056}, {587, 14336}}) {
    const Tensor x = activations(rng, {M, 2 * F}, true);
    const TensorView x_gpu = on_gpu(x);
    for (const Scaling scaling : {Scaling::kBlock, Scaling::kRow}) {
      const std::string what = fmt::format("M {} F {} {}", M, F, scaling == Scaling::kBlock);
      const RowsPair row = rows(M, F, scaling);
      StatsPair s = stats(true);
      swiglu_quantize(cpu, x, {}, false, row.cpu, nullptr, &s.cpu);
      swiglu_quantize(gpu, x_gpu, {}, false, row.gpu, nullptr, s.on_gpu());
      expect_same(row, what);
      expect_same(s, what);
    }
  }
}

TEST_F(SwigluGpu, BackwardQuantize) {
  Rng rng(3);
  for (const auto& counts : segment_cases())
    for (const std::int64_t F : {1, 64, 128, 200, 256}) {
      const SegmentPair seg = segments(counts);
      const Tensor x = activations(rng, {seg.M, 2 * F}, true),
                   d = activations(rng, {seg.M, F}, false);
      const TensorView x_gpu = on_gpu(x), d_gpu = on_gpu(d);
      for_all_modes([&](Scaling scaling, bool pow2, bool counted, const std::string& mode) {
        const bool with_columns = mode_ % 5 != 0, with_values = mode_ % 3 != 0;
        const std::string what =
            fmt::format("segments {} F {} {}", fmt::join(counts, " "), F, mode);
        const RowsPair row = rows(seg.M, 2 * F, scaling);
        const ColumnsPair column = columns(2 * F, seg, scaling, mode_ % 2 * 128);
        const Tensor g = cpu_output(DType::kBf16, {seg.M, 2 * F});
        const TensorView g_gpu = gpu_output(DType::kBf16, {seg.M, 2 * F});
        StatsPair s = stats(mode_ % 2 == 0);
        swiglu_backward_quantize(cpu, x, d, seg.cpu, pow2, with_values ? g.view() : TensorView{},
                                 row.cpu, with_columns ? &column.cpu : nullptr,
                                 counted ? &s.cpu : nullptr);
        swiglu_backward_quantize(
            gpu, x_gpu, d_gpu, seg.gpu, pow2, with_values ? g_gpu : TensorView{}, row.gpu,
            with_columns ? &column.gpu : nullptr, counted ? s.on_gpu() : nullptr);
        expect_same(g, g_gpu, what + " BF16");
        expect_same(row, what);
        expect_same(column, what);
        expect_same(s, what);
      });
    }
}

}  // namespace
}  // namespace lockstep::ops::test

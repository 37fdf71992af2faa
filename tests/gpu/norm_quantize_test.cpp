// rms_norm_quantize of the GPU against the CPU's, by bytes.
#include "ops/norm_quantize.h"

#include "gpu/quant_case.h"

namespace lockstep::ops::test {
namespace {

class NormQuantizeGpu : public QuantGpuTest {
 protected:
  // In every n-th mode.
  void expect_bytes_of_cpu(const std::vector<std::int32_t>& counts, std::int64_t D, int n = 1) {
    const SegmentPair seg = segments(counts);
    const std::int64_t T = seg.M;
    const Tensor x = random_normal(rng_, DType::kBf16, {T, D}, 3.0),
                 delta = random_normal(rng_, DType::kBf16, {T, D}),
                 w = random_normal(rng_, DType::kBf16, {D});
    if (T > 2)  // a row of zeros, and one that is not finite
      for (std::int64_t d = 0; d < D; ++d) {
        x.as<numerics::Bf16>()[d].bits = delta.as<numerics::Bf16>()[d].bits = 0;
        if (d == D / 2) x.as<numerics::Bf16>()[2 * D + d].bits = 0x7F80;
      }
    const TensorView x_gpu = on_gpu(x), delta_gpu = on_gpu(delta), w_gpu = on_gpu(w);
    for_all_modes([&](Scaling scaling, bool pow2, bool counted, const std::string& mode) {
      if (mode_ % n != 0) return;
      const bool with_columns = mode_ % 3 != 0, with_h = mode_ % 5 < 3, residual = mode_ % 7 != 0;
      const std::string what =
          fmt::format("segments {} D {} {} columns {} h {} residual {}", fmt::join(counts, " "), D,
                      mode, with_columns, with_h, residual);
      const RowsPair row = rows(T, D, scaling);
      const ColumnsPair column = columns(D, seg, scaling, mode_ % 3 * 128);
      const Tensor h = cpu_output(DType::kBf16, {T, D}), out = cpu_output(DType::kBf16, {T, D}),
                   rstd = cpu_output(DType::kFp32, {T});
      const TensorView h_gpu = gpu_output(DType::kBf16, {T, D}),
                       out_gpu = gpu_output(DType::kBf16, {T, D}),
                       rstd_gpu = gpu_output(DType::kFp32, {T});
      StatsPair s = stats(mode_ % 2 == 0);
      rms_norm_quantize(cpu, x, residual ? delta.view() : TensorView{}, w, 1e-6f, out,
                        with_h ? h.view() : TensorView{}, rstd, seg.cpu, pow2, row.cpu,
                        with_columns ? &column.cpu : nullptr, counted ? &s.cpu : nullptr);
      rms_norm_quantize(gpu, x_gpu, residual ? delta_gpu : TensorView{}, w_gpu, 1e-6f, out_gpu,
                        with_h ? h_gpu : TensorView{}, rstd_gpu, seg.gpu, pow2, row.gpu,
                        with_columns ? &column.gpu : nullptr, counted ? s.on_gpu() : nullptr);
      expect_same(out, out_gpu, what + " x_out");
      expect_same(rstd, rstd_gpu, what + " rstd");
      expect_same(h, h_gpu, what + " h");
      expect_same(row, what);
      expect_same(column, what);
      expect_same(s, what);
    });
  }

 private:
  Rng rng_{1};
};

TEST_F(NormQuantizeGpu, SegmentsAndWidths) {
  for (const auto& counts : segment_cases())
    for (const std::int64_t D : {1, 8, 127, 128, 200, 256, 264, 1000, 2048})
      expect_bytes_of_cpu(counts, D);
}

// Rows on several warps, and those that are too wide for them.
TEST_F(NormQuantizeGpu, WideRows) {
  for (const std::int64_t D : {1024, 1032, 7168, 16384, 16392}) expect_bytes_of_cpu({5, 3}, D);
}

// A warp, or the warps of a row, meet several rows, and segments that end on the way.
TEST_F(NormQuantizeGpu, ManyNarrowRows) { expect_bytes_of_cpu({30000, 2, 700}, 8); }
TEST_F(NormQuantizeGpu, ManyRows) {
  expect_bytes_of_cpu({3000, 3, 700, 1}, 1032);
  expect_bytes_of_cpu({15000}, 1032, 3);
}
TEST_F(NormQuantizeGpu, ManyWideRows) { expect_bytes_of_cpu({1200, 70, 600}, 3080, 5); }

}  // namespace
}  // namespace lockstep::ops::test

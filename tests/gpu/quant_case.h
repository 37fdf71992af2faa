// What the GPU tests of the quantizers share: values with zero blocks, tiny and non-finite ones,
// outputs of both layouts on both devices, and their comparison.
#pragma once

#include "gpu/gpu_test.h"
#include "ops/quantize.h"

namespace lockstep::ops::test {

// BF16 over many powers of two with zeros; a row of -0, values near the scale's floor and, where
// asked, infinities and NaNs.
inline Tensor varied_bf16(Rng& rng, const Shape& shape, bool nonfinite) {
  Tensor x = empty(DType::kBf16, shape);
  const std::int64_t width = shape[shape.rank - 1], count = shape.count();
  auto* p = x.as<numerics::Bf16>();
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint64_t r = rng();
    const std::int64_t row = i / width;
    const auto exponent = static_cast<std::uint64_t>(row % 7 == 5 ? 0 : 110) + r % 24;
    p[i].bits = static_cast<std::uint16_t>((r >> 32 & 0x807F) | exponent << 7);
    if (r >> 20 % 10 == 0 || row % 11 == 1) p[i].bits &= 0x8000;
    if (nonfinite && (r >> 40) % 1500 == 0) p[i].bits = (r & 1) != 0 ? 0xFF80 : 0xFFC1;
  }
  return x;
}

// Segments of the given sizes, on both devices.
struct SegmentPair {
  Segments cpu, gpu;
  std::int64_t M = 0, padded = 0;
};

class QuantGpuTest : public GpuTest {
 protected:
  SegmentPair segments(const std::vector<std::int32_t>& counts) {
    std::vector<std::int32_t> offsets{0}, padded{0};
    for (const std::int32_t n : counts) {
      offsets.push_back(offsets.back() + n);
      padded.push_back(padded.back() + (n + 127) / 128 * 128);
    }
    kept_.push_back(int32_tensor(offsets));
    const TensorView o = kept_.back();
    kept_.push_back(int32_tensor(padded));
    const TensorView p = kept_.back();
    return {{o, p}, {on_gpu(o), on_gpu(p)}, offsets.back(), padded.back()};
  }

  struct RowsPair {
    Tensor codes, scales;
    Fp8Rows cpu, gpu;
  };
  RowsPair rows(std::int64_t M, std::int64_t K, Scaling scaling) {
    const Shape shape = scaling == Scaling::kBlock ? Shape{(K + 127) / 128, M} : Shape{M};
    RowsPair r{cpu_output(DType::kE4m3, {M, K}), cpu_output(DType::kFp32, shape), {}, {}};
    r.cpu = {r.codes, r.scales, scaling};
    r.gpu = {gpu_output(DType::kE4m3, {M, K}), gpu_output(DType::kFp32, shape), scaling};
    return r;
  }
  void expect_same(const RowsPair& r, const std::string& what) {
    GpuTest::expect_same(r.cpu.codes_MK, r.gpu.codes_MK, what + " row codes");
    GpuTest::expect_same(r.cpu.scales, r.gpu.scales, what + " row scales");
  }

  // `spare` more padded rows than the segments have.
  struct ColumnsPair {
    Tensor codes, scales;
    Fp8Columns cpu, gpu;
  };
  ColumnsPair columns(std::int64_t N, const SegmentPair& s, Scaling scaling, std::int64_t spare) {
    const std::int64_t R = s.padded + spare;
    const Shape shape = scaling == Scaling::kBlock ? Shape{R / 128, N} : Shape{s.cpu.experts(), N};
    ColumnsPair c{cpu_output(DType::kE4m3, {N, R}), cpu_output(DType::kFp32, shape), {}, {}};
    c.cpu = {c.codes, c.scales, scaling};
    c.gpu = {gpu_output(DType::kE4m3, {N, R}), gpu_output(DType::kFp32, shape), scaling};
    return c;
  }
  void expect_same(const ColumnsPair& c, const std::string& what) {
    GpuTest::expect_same(c.cpu.codes_NR, c.gpu.codes_NR, what + " column codes");
    GpuTest::expect_same(c.cpu.scales, c.gpu.scales, what + " column scales");
  }
  using GpuTest::expect_same;

  // Counters that an op adds to, on both devices, not zero before.
  struct StatsPair {
    QuantStats cpu;
    TensorView gpu;
    QuantStats* on_gpu() const { return static_cast<QuantStats*>(gpu.data); }
  };
  StatsPair stats(bool fresh) {
    StatsPair s;
    if (!fresh) s.cpu = {11, 0, 5, 3, 1, 2, 0x1p-20f, 0x1p3f};
    s.gpu = gpu_output(DType::kE4m3, {static_cast<std::int64_t>(sizeof(QuantStats))});
    tensor::copy_bytes(gpu, &s.cpu, Device::kCpu, s.gpu.data, Device::kCuda, sizeof(QuantStats));
    return s;
  }
  void expect_same(const StatsPair& s, const std::string& what) {
    QuantStats got;
    tensor::copy_bytes(gpu, s.gpu.data, Device::kCuda, &got, Device::kCpu, sizeof(QuantStats));
    EXPECT_EQ(got.values, s.cpu.values) << what;
    EXPECT_EQ(got.saturated, s.cpu.saturated) << what;
    EXPECT_EQ(got.flushed_to_zero, s.cpu.flushed_to_zero) << what;
    EXPECT_EQ(got.blocks, s.cpu.blocks) << what;
    EXPECT_EQ(got.zero_blocks, s.cpu.zero_blocks) << what;
    EXPECT_EQ(got.nonfinite_blocks, s.cpu.nonfinite_blocks) << what;
    EXPECT_EQ(got.amax_min, s.cpu.amax_min) << what;
    EXPECT_EQ(got.amax_max, s.cpu.amax_max) << what;
  }

  // Every size meets both kinds of scales, pow2 and not, with and without counters.
  void for_all_modes(const std::function<void(Scaling, bool, bool, const std::string&)>& run) {
    for (const Scaling scaling : {Scaling::kBlock, Scaling::kRow})
      for (const bool pow2 : {false, true})
        for (const bool counted : {false, true}) {
          if (!left_out(7))
            run(scaling, pow2, counted,
                fmt::format("{}{}{}", scaling == Scaling::kBlock ? "block" : "row",
                            pow2 ? " pow2" : "", counted ? " counted" : ""));
          ++mode_;
        }
  }
  int mode_ = 0;

 private:
  std::vector<Tensor> kept_;
};

inline const std::vector<std::vector<std::int32_t>>& segment_cases() {
  static const std::vector<std::vector<std::int32_t>> cases{{0},
                                                            {1},
                                                            {127},
                                                            {128},
                                                            {129},
                                                            {0, 0, 0},
                                                            {129, 0, 1, 127, 300, 0},
                                                            {257},
                                                            {0, 5, 128, 0, 64},
                                                            {3, 1, 2, 1, 0, 7, 130}};
  return cases;
}

}  // namespace lockstep::ops::test

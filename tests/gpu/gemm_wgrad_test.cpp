
#include "gpu/gemm_case.h"
#include "ops/gemm.h"

namespace lockstep::ops::test {
namespace {

class WgradGpu : public GpuTest {
 protected:
  // on_cpu(accumulate, d) against run_on_gpu(accumulate, d). d starts as random
  // values where it is accumulated onto, otherwise as NaN.
  template <typename OnCpu, typename OnGpu>
  void compare(const Shape& shape, const std::string& name, OnCpu on_cpu, OnGpu run_on_gpu) {
    for (const bool accumulate : {false, true}) {
      const Tensor start = spread_values(rng, DType::kFp32, shape);
      const Tensor expected = cpu_output(DType::kFp32, shape);
      if (accumulate) std::memcpy(expected.view().data, start.view().data, start.view().bytes());
      on_cpu(accumulate, expected.view());
      const TensorView d = gpu_output(DType::kFp32, shape);
      if (accumulate) tensor::copy(gpu, start, d);
      run_on_gpu(accumulate, d);
      expect_same(expected, d, name + (accumulate ? " accumulated" : ""));
    }
  }

  void check_bf16(std::int64_t N, std::int64_t K, const std::vector<std::int32_t>& offsets,
                  bool grouped = true, bool nan_behind_first = false, std::int64_t chain_rows = 0) {
    const std::int64_t E = static_cast<std::int64_t>(offsets.size()) - 1, M = offsets.back();
    Tensor dy = spread_values(rng, DType::kBf16, {M, N}),
           x = spread_values(rng, DType::kBf16, {M, K});
    if (nan_behind_first) {
      for (std::int64_t i = offsets[1] * N; i < M * N; ++i) dy.as<numerics::Bf16>()[i] = {0x7FC0};
      for (std::int64_t i = offsets[1] * K; i < M * K; ++i) x.as<numerics::Bf16>()[i] = {0x7FC0};
    }
    const Tensor o = grouped ? int32_tensor(offsets) : Tensor();
    const TensorView gpu_dy = on_gpu(dy), gpu_x = on_gpu(x), gpu_o = on_gpu(o);
    compare(
        {E, N, K}, fmt::format("bf16 {} chains of {}", text_of(offsets), chain_rows),
        [&](bool accumulate, const TensorView& d) {
          bf16_weight_gradient(cpu, dy, x, o, accumulate, d, chain_rows);
        },
        [&](bool accumulate, const TensorView& d) {
          bf16_weight_gradient(gpu, gpu_dy, gpu_x, gpu_o, accumulate, d, chain_rows);
        });
  }

  void check_fp8(std::int64_t N, std::int64_t K, const std::vector<std::int32_t>& offsets,
                 Scaling scaling = Scaling::kBlock, DType dy_type = DType::kE4m3,
                 DType x_type = DType::kE4m3, std::int64_t spare_rows = 128, int nan_expert = -1,
                 float scale = 1) {
    const std::int64_t E = static_cast<std::int64_t>(offsets.size()) - 1;
    const std::vector<std::int32_t> padded = padded_to_128(offsets);
    const std::int64_t R = padded.back() + spare_rows;
    const bool block = scaling == Scaling::kBlock;
    const auto columns = [&](DType type, std::int64_t C) {
      Tensor codes = spread_values(rng, type, {C, R});
      std::uint8_t* p = codes.view().fp8();
      for (std::int64_t e = 0; e < E; ++e)
        for (std::int64_t r = padded[e]; r < padded[e + 1]; ++r)
          for (std::int64_t c = 0; c < C; ++c)
            if (r >= padded[e] + offsets[e + 1] - offsets[e])
              p[c * R + r] = 0;
            else if (e == nan_expert)
              p[c * R + r] = 0x7F;
      for (std::int64_t r = padded.back(); r < R; ++r)  // never read
        for (std::int64_t c = 0; c < C; ++c) p[c * R + r] = 0x7F;
      return codes;
    };
    const Tensor dy = columns(dy_type, N), x = columns(x_type, K);
    const Tensor sdy = spread_scales(rng, {block ? (R + 127) / 128 : E, N}),
                 sx = spread_scales(rng, {block ? (R + 127) / 128 : E, K});
    for (const Tensor* s : {&sdy, &sx})
      for (std::int64_t i = 0; i < s->view().count(); ++i) s->as<float>()[i] *= scale;
    const Tensor o = int32_tensor(offsets), p = int32_tensor(padded);
    const Fp8Columns cpu_dy{dy, sdy, scaling}, cpu_x{x, sx, scaling};
    const Fp8Columns gpu_dy{on_gpu(dy), on_gpu(sdy), scaling},
        gpu_x{on_gpu(x), on_gpu(sx), scaling};
    const Segments cpu_s{o, p}, gpu_s{on_gpu(o), on_gpu(p)};
    compare(
        {E, N, K},
        std::string(block ? "block " : "row ") + tensor::dtype_name(dy_type) + " " +
            tensor::dtype_name(x_type) + " " + text_of(offsets),
        [&](bool accumulate, const TensorView& d) {
          fp8_weight_gradient(cpu, cpu_dy, cpu_x, cpu_s, accumulate, d);
        },
        [&](bool accumulate, const TensorView& d) {
          fp8_weight_gradient(gpu, gpu_dy, gpu_x, gpu_s, accumulate, d);
        });
  }
  Rng rng{2};
};

TEST_F(WgradGpu, Bf16OneTile) {
  check_bf16(128, 128, {0, 64});
  check_bf16(128, 128, {0, 16});
  check_bf16(16, 16, {0, 16});
}

TEST_F(WgradGpu, Bf16RowCounts) {
  for (const int M : {0, 1, 15, 16, 17, 47, 63, 64, 65, 127, 129, 390, 1021})
    check_bf16(24, 40, {0, M}, M % 2 == 0);
}

TEST_F(WgradGpu, Bf16Widths) {
  for (const std::int64_t n : {8, 64, 120, 128, 136, 264}) {
    check_bf16(n, 24, {0, 21});
    check_bf16(24, n, {0, 21});
  }
  check_bf16(2048, 768, {0, 3, 3, 5});
  check_bf16(1048, 2056, {0, 9});
  check_bf16(1544, 1304, {0, 300, 300, 391});
}

TEST_F(WgradGpu, Bf16OddWidths) {
  for (const std::int64_t n : {1, 7, 31, 33}) check_bf16(n, 2 * n + 1, {0, 5, 5, 23});
  check_bf16(5, 12, {0, 33}, false);
}

TEST_F(WgradGpu, Bf16Groups) {
  check_bf16(136, 72, {0, 0, 1, 34, 34, 163, 167, 300, 300});
  check_bf16(72, 136, {0, 0, 0});
}

TEST_F(WgradGpu, Bf16Chains) {
  for (const std::int64_t chain : {64, 128, 1024}) {
    for (const int M : {0, 1, 63, 64, 65, 128, 129, 1023, 1025, 2048})
      check_bf16(24, 40, {0, M}, M % 2 == 0, false, chain);
    check_bf16(136, 72, {0, 0, 1, 34, 34, 163, 419, 700, 700}, true, false, chain);
    check_bf16(1544, 1304, {0, 300, 300, 391}, true, false, chain);
    check_bf16(33, 67, {0, 5, 5, 150}, true, false, chain);
  }
}

TEST_F(WgradGpu, Bf16NanOfAnotherExpertStaysThere) {
  for (const int rows : {1, 17, 63, 64, 100}) check_bf16(136, 40, {0, rows, 200, 230}, true, true);
}

TEST_F(WgradGpu, Fp8OneTile) {
  check_fp8(128, 128, {0, 128}, Scaling::kRow);
  check_fp8(128, 128, {0, 128}, Scaling::kBlock);
  check_fp8(16, 16, {0, 128}, Scaling::kBlock);
}

TEST_F(WgradGpu, Fp8RowCounts) {
  for (const Scaling scaling : {Scaling::kBlock, Scaling::kRow})
    for (const int M : {0, 1, 31, 127, 128, 129, 257, 1021}) check_fp8(32, 48, {0, M}, scaling);
  check_fp8(32, 48, {0, 0, 0}, Scaling::kRow, DType::kE4m3, DType::kE4m3, 0);
  check_fp8(32, 48, {0, 200}, Scaling::kBlock, DType::kE4m3, DType::kE4m3, 0);
}

TEST_F(WgradGpu, Fp8Widths) {
  for (const Scaling scaling : {Scaling::kBlock, Scaling::kRow})
    for (const std::int64_t n : {16, 112, 128, 144, 272}) {
      check_fp8(n, 32, {0, 140}, scaling);
      check_fp8(32, n, {0, 140}, scaling);
    }
  check_fp8(2048, 768, {0, 130, 130, 131});
  check_fp8(1040, 2064, {0, 9});
  check_fp8(1552, 1296, {0, 700, 700, 1000});
}

TEST_F(WgradGpu, Fp8Groups) {
  for (const Scaling scaling : {Scaling::kBlock, Scaling::kRow})
    check_fp8(144, 80, {0, 0, 1, 130, 130, 161, 417, 1500, 1500}, scaling);
}

TEST_F(WgradGpu, Fp8Types) {
  for (const Scaling scaling : {Scaling::kBlock, Scaling::kRow})
    for (const DType dy : {DType::kE4m3, DType::kE5m2})
      for (const DType x : {DType::kE4m3, DType::kE5m2})
        check_fp8(48, 64, {0, 150, 290}, scaling, dy, x);
}

// Many products are too small for FP32; those below zero are written as +0.
TEST_F(WgradGpu, Fp8TinyScales) {
  for (const Scaling scaling : {Scaling::kBlock, Scaling::kRow})
    check_fp8(144, 80, {0, 3, 3, 200}, scaling, DType::kE4m3, DType::kE4m3, 128, -1, 0x1p-71f);
}

TEST_F(WgradGpu, Fp8NanOfAnotherExpertStaysThere) {
  for (const Scaling scaling : {Scaling::kBlock, Scaling::kRow})
    check_fp8(48, 64, {0, 150, 290, 300}, scaling, DType::kE4m3, DType::kE4m3, 128, 1);
}

}  // namespace
}  // namespace lockstep::ops::test

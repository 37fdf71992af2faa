#include "ops/cuda/gemm_bf16.h"

#include "gpu/gemm_case.h"
#include "ops/gemm.h"

namespace lockstep::ops::test {
namespace {

class Bf16GemmGpu : public GpuTest {
 protected:
  // Against the CPU, with the plan that the op chooses and with all others. offsets empty: one
  // group of M rows.
  void check(std::int64_t M, std::int64_t N, std::int64_t K,
             const std::vector<std::int32_t>& offsets = {}, DType out = DType::kFp32,
             int spread = 6) {
    const std::int64_t E = offsets.empty() ? 1 : static_cast<std::int64_t>(offsets.size()) - 1;
    const Tensor a = spread_values(rng, DType::kBf16, {M, K}, spread);
    const Tensor o = offsets.empty() ? Tensor() : int32_tensor(offsets);
    const TensorView gpu_a = on_gpu(a), gpu_o = on_gpu(o);
    for (const BLayout layout : {BLayout::kNK, BLayout::kKN}) {
      const bool nk = layout == BLayout::kNK;
      const Tensor b =
          spread_values(rng, DType::kBf16, nk ? Shape{E, N, K} : Shape{E, K, N}, spread);
      const TensorView gpu_b = on_gpu(b);
      const Tensor expected = cpu_output(out, {M, N});
      bf16_gemm(cpu, a, b, layout, o, expected);
      const std::string name = std::to_string(M) + " x " + std::to_string(N) + " x " +
                               std::to_string(K) + (nk ? " NK " : " KN ") + text_of(offsets);
      const TensorView d = gpu_output(out, {M, N});
      bf16_gemm(gpu, gpu_a, gpu_b, layout, gpu_o, d);
      expect_same(expected, d, name);
      for (const auto plan : {cuda::Bf16Plan::k128x256, cuda::Bf16Plan::k128x128,
                              cuda::Bf16Plan::kSwap64, cuda::Bf16Plan::kSwap16}) {
        const TensorView forced = gpu_output(out, {M, N});
        cuda::bf16_gemm(gpu, plan, gpu_a, gpu_b, layout, gpu_o, forced);
        expect_same(expected, forced, name + " plan " + std::to_string(static_cast<int>(plan)));
      }
    }
  }
  Rng rng{1};
};

TEST_F(Bf16GemmGpu, OneTile) {
  check(128, 128, 64);
  check(128, 128, 128);
  check(16, 16, 16);
}

TEST_F(Bf16GemmGpu, RowCounts) {
  for (const std::int64_t M : {0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 257})
    check(M, 40, 72);
}

TEST_F(Bf16GemmGpu, ColumnCounts) {
  for (const std::int64_t N : {0, 8, 16, 120, 128, 136, 248, 256, 264}) check(19, N, 40);
}

TEST_F(Bf16GemmGpu, ContractionLengths) {
  for (const std::int64_t K : {0, 8, 16, 24, 56, 64, 72, 128, 1032}) check(21, 24, K);
}

// Rows that are not multiples of 16 bytes: without the copy engine.
TEST_F(Bf16GemmGpu, OddSizes) {
  for (const std::int64_t n : {1, 7, 17, 31, 33, 101}) {
    check(n + 3, n, 37);
    check(33, n, 2 * n);
  }
  check(30, 13, 21, {0, 0, 1, 12, 30, 30});
}

TEST_F(Bf16GemmGpu, Bf16Output) {
  check(70, 136, 200, {}, DType::kBf16);
  check(3, 8, 16, {}, DType::kBf16);
  check(30, 13, 21, {0, 0, 1, 12, 30, 30}, DType::kBf16);
  check(167, 264, 72, {0, 0, 1, 34, 34, 163, 167, 167}, DType::kBf16);
}

TEST_F(Bf16GemmGpu, Groups) {
  check(167, 136, 72, {0, 0, 1, 34, 34, 163, 167, 167});
  check(0, 136, 72, {0, 0, 0});
  std::vector<std::int32_t> many{0};  // more than a warp's width
  for (int e = 0; e < 70; ++e) many.push_back(many.back() + (e % 3 == 0 ? 0 : e % 7));
  check(many.back(), 24, 40, many);
}

// More tiles than multiprocessors, several bands of row tiles.
TEST_F(Bf16GemmGpu, ManyTiles) {
  check(2300, 1288, 24);
  check(2300, 648, 40, {0, 5, 1300, 1301, 2300});
}

TEST_F(Bf16GemmGpu, ExponentsFarApart) {
  check(65, 40, 136, {}, DType::kFp32, 60);
  check(65, 40, 136, {}, DType::kBf16, 60);
}

// Router, attention and head of real models, few rows.
TEST_F(Bf16GemmGpu, ModelWidths) {
  check(3, 128, 2048);  // Qwen3-30B-A3B's router
  check(5, 256, 7168);  // DeepSeek-V3's router
  check(2, 1536, 2048, {0, 1, 1, 2});
  check(17, 4096, 1024);
}

// A row's neighbours of another group may hold anything.
TEST_F(Bf16GemmGpu, NanOfAnotherGroupStaysThere) {
  const std::int64_t M = 40, N = 136, K = 72;
  Tensor a = spread_values(rng, DType::kBf16, {M, K});
  for (std::int64_t i = 13 * K; i < M * K; ++i) a.as<numerics::Bf16>()[i] = {0x7FC0};
  const Tensor b = spread_values(rng, DType::kBf16, {2, N, K}), o = int32_tensor({0, 13, 40});
  for (const DType out : {DType::kFp32, DType::kBf16}) {
    const Tensor expected = cpu_output(out, {M, N});
    bf16_gemm(cpu, a, b, BLayout::kNK, o, expected);
    const TensorView d = gpu_output(out, {M, N});
    bf16_gemm(gpu, on_gpu(a), on_gpu(b), BLayout::kNK, on_gpu(o), d);
    expect_same(expected, d, "NaN in group 1");
  }
}

}  // namespace
}  // namespace lockstep::ops::test

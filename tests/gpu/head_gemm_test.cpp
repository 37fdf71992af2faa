#include "ops/head_gemm.h"

#include "gpu/gpu_test.h"

namespace lockstep::ops::test {
namespace {

class HeadGemmGpu : public GpuTest {};

struct Sizes {
  std::int64_t T, H, before, rows, behind, L;
};
const Sizes kSizes[] = {{1, 2, 0, 8, 8, 16},       {5, 3, 8, 16, 0, 8},
                        {127, 2, 128, 128, 0, 64}, {129, 2, 0, 128, 128, 96},
                        {300, 5, 16, 32, 0, 512},  {70, 40, 0, 128, 128, 512},
                        {257, 1, 0, 264, 8, 320},  {0, 3, 0, 16, 16, 32}};

std::string text(const Sizes& n) {
  return " T " + std::to_string(n.T) + " H " + std::to_string(n.H) + " rows " +
         std::to_string(n.rows) + " L " + std::to_string(n.L);
}

TEST_F(HeadGemmGpu, ProductHasTheBytesOfTheCpu) {
  Rng rng(1);
  for (const Sizes& n : kSizes)
    for (const BLayout layout : {BLayout::kNK, BLayout::kKN}) {
      const bool nk = layout == BLayout::kNK;
      const std::int64_t K = nk ? n.L : n.rows, N = nk ? n.rows : n.L;
      const Tensor w = random_normal(rng, DType::kBf16, {n.H, n.before + n.rows + n.behind, n.L});
      const Tensor a = random_normal(rng, DType::kBf16, {n.T, 8 + n.H * (K + 64)}),
                   d = cpu_output(DType::kBf16, {n.T, 16 + n.H * (N + 8)});
      const TensorView gpu_w = on_gpu(w), gpu_a = on_gpu(a),
                       gpu_d = gpu_output(DType::kBf16, d.view().shape);
      head_gemm(cpu, {a, 8, K + 64}, {w, n.before, n.rows}, layout, {d, 16, N + 8});
      head_gemm(gpu, {gpu_a, 8, K + 64}, {gpu_w, n.before, n.rows}, layout, {gpu_d, 16, N + 8});
      expect_same(d, gpu_d, (nk ? "NK" : "KN") + text(n));
    }
}

TEST_F(HeadGemmGpu, WeightGradientHasTheBytesOfTheCpu) {
  Rng rng(2);
  for (const Sizes& n : kSizes)
    for (const bool accumulate : {false, true}) {
      const std::int64_t R = n.before + n.rows + n.behind;
      const Tensor y = random_normal(rng, DType::kBf16, {n.T, 24 + n.H * (n.rows + 8)}),
                   x = random_normal(rng, DType::kBf16, {n.T, n.H * (n.L + 64)}),
                   d = random_normal(rng, DType::kFp32, {n.H, R, n.L});
      const TensorView gpu_y = on_gpu(y), gpu_x = on_gpu(x), gpu_d = on_gpu(d);
      head_weight_gradient(cpu, {y, 24, n.rows + 8}, {x, 0, n.L + 64}, accumulate,
                           {d, n.before, n.rows});
      head_weight_gradient(gpu, {gpu_y, 24, n.rows + 8}, {gpu_x, 0, n.L + 64}, accumulate,
                           {gpu_d, n.before, n.rows});
      expect_same(d, gpu_d, "dW" + text(n));
    }
}

TEST_F(HeadGemmGpu, RefusesWhatTheCopyEngineCannotReach) {
  Rng rng(3);
  const TensorView a = on_gpu(random_normal(rng, DType::kBf16, {3, 40})),
                   w = on_gpu(random_normal(rng, DType::kBf16, {2, 16, 16})),
                   d = gpu_output(DType::kBf16, {3, 32});
  const auto run = [&](const Columns& from, const HeadRows& b) {
    head_gemm(gpu, from, b, BLayout::kNK, {d, 0, 16});
  };
  EXPECT_NO_THROW(run({a, 8, 16}, {w, 0, 16}));
  EXPECT_THROW(run({a, 4, 16}, {w, 0, 16}), base::ContractError);
  EXPECT_THROW(run({a, 0, 20}, {w, 0, 16}), base::ContractError);
  EXPECT_THROW(run({a, 8, 16}, {w, 0, 12}), base::ContractError);
}

}  // namespace
}  // namespace lockstep::ops::test

#include "ops/bias.h"

#include "gpu/gpu_test.h"

namespace lockstep::ops::test {
namespace {

using BiasGpu = GpuTest;

TEST_F(BiasGpu, SameBytesAsTheCpu) {
  Rng rng(1);
  for (const std::int64_t N : {1, 63, 64, 129, 768, 5120})
    for (const std::int64_t T : {0, 1, 127, 128, 129, 1000}) {
      const std::string what = fmt::format("T {} N {}", T, N);
      const Tensor x = random_normal(rng, DType::kFp32, {T, N});
      const Tensor bias = random_normal(rng, DType::kBf16, {N});
      const Tensor out = cpu_output(DType::kBf16, {T, N});
      const TensorView gpu_out = gpu_output(DType::kBf16, {T, N});
      add_bias(cpu, x, bias, out);
      add_bias(gpu, on_gpu(x), on_gpu(bias), gpu_out);
      expect_same(out, gpu_out, "bias, " + what);

      const Tensor d = random_normal(rng, DType::kFp32, {N});
      const TensorView gpu_d = on_gpu(d);
      bias_backward(cpu, out, d);
      bias_backward(gpu, gpu_out, gpu_d);
      expect_same(d, gpu_d, "gradient of the bias, " + what);

      const numerics::Bf16 limit = numerics::to_bf16(0.7f);
      const Tensor d_out = random_normal(rng, DType::kBf16, {T, N});
      const TensorView gpu_d_out = on_gpu(d_out);
      clip(cpu, out, limit);
      clip(gpu, gpu_out, limit);
      expect_same(out, gpu_out, "clip, " + what);
      clip_backward(cpu, out, limit, d_out);
      clip_backward(gpu, gpu_out, limit, gpu_d_out);
      expect_same(d_out, gpu_d_out, "gradient through clip, " + what);
    }
}

}  // namespace
}  // namespace lockstep::ops::test

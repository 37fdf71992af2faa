#include "ops/cast.h"

#include "gpu/gpu_test.h"

namespace lockstep::ops::test {
namespace {

using CastGpu = GpuTest;

TEST_F(CastGpu, SameBytesAsTheCpu) {
  Rng rng(1);
  for (const std::int64_t n : {0, 1, 255, 256, 257, 100003}) {
    Tensor x = empty(DType::kFp32, {n});
    for (std::int64_t i = 0; i < n; ++i)
      x.as<float>()[i] = numerics::bits_float(static_cast<std::uint32_t>(rng()));
    const Tensor narrow = cpu_output(DType::kBf16, {n}), wide = cpu_output(DType::kFp32, {n});
    const TensorView gpu_narrow = gpu_output(DType::kBf16, {n}),
                     gpu_wide = gpu_output(DType::kFp32, {n});
    cast(cpu, x, narrow);
    cast(gpu, on_gpu(x), gpu_narrow);
    expect_same(narrow, gpu_narrow, "bf16");
    cast(cpu, narrow, wide);
    cast(gpu, gpu_narrow, gpu_wide);
    expect_same(wide, gpu_wide, "fp32");
  }
}

}  // namespace
}  // namespace lockstep::ops::test

#include "ops/columns.h"

#include "gpu/gpu_test.h"
#include "ops/norm.h"

namespace lockstep::ops::test {
namespace {

class ColumnsGpu : public GpuTest {};

std::string text(std::int64_t T, std::int64_t D) {
  return " T " + std::to_string(T) + " width " + std::to_string(D);
}

TEST_F(ColumnsGpu, NormHasTheBytesOfTheCpu) {
  Rng rng(1);
  for (const std::int64_t D : {1, 7, 128, 255, 512, 1536})
    for (const std::int64_t T : {0, 1, 3, 127, 300}) {
      const Tensor slab = random_normal(rng, DType::kBf16, {T, D + 65}, 2.0);
      const Tensor d_slab = random_normal(rng, DType::kBf16, {T, D + 3});
      const Tensor w = random_normal(rng, DType::kBf16, {D});
      const Tensor h = cpu_output(DType::kBf16, {T, D + 8}), rstd = cpu_output(DType::kFp32, {T}),
                   dx = cpu_output(DType::kBf16, {T, D + 2}),
                   dw = random_normal(rng, DType::kFp32, {D});
      const TensorView x = on_gpu(slab), d = on_gpu(d_slab), gpu_w = on_gpu(w),
                       gpu_h = gpu_output(DType::kBf16, {T, D + 8}),
                       gpu_rstd = gpu_output(DType::kFp32, {T}),
                       gpu_dx = gpu_output(DType::kBf16, {T, D + 2}), gpu_dw = on_gpu(dw);
      rms_norm_columns(cpu, {slab, 64}, w, 1e-6f, {h, 8}, rstd);
      rms_norm_columns(gpu, {x, 64}, gpu_w, 1e-6f, {gpu_h, 8}, gpu_rstd);
      expect_same(h, gpu_h, "h" + text(T, D));
      expect_same(rstd, gpu_rstd, "rstd" + text(T, D));
      rms_norm_columns_backward(cpu, {d_slab, 1}, {slab, 64}, w, rstd, {dx, 2}, dw);
      rms_norm_columns_backward(gpu, {d, 1}, {x, 64}, gpu_w, gpu_rstd, {gpu_dx, 2}, gpu_dw);
      expect_same(dx, gpu_dx, "dx" + text(T, D));
      expect_same(dw, gpu_dw, "dw" + text(T, D));
      rms_norm_columns_backward(cpu, {d_slab, 1}, {slab, 64}, w, rstd, {d_slab, 1}, dw);
      rms_norm_columns_backward(gpu, {d, 1}, {x, 64}, gpu_w, gpu_rstd, {d, 1}, gpu_dw);
      expect_same(d_slab, d, "dx over dh" + text(T, D));
      expect_same(dw, gpu_dw, "dw again" + text(T, D));
    }
}

TEST_F(ColumnsGpu, RotationHasTheBytesOfTheCpu) {
  Rng rng(2);
  const std::int64_t P = 300;
  for (const std::int64_t R : {2, 6, 64})
    for (const std::int64_t H : {1, 16, 128})
      for (const std::int64_t T : {0, 1, 5, 131})
        for (const RopePairs pairs : {RopePairs::kHalves, RopePairs::kInterleaved}) {
          const Tensor c = Tensor(Device::kCpu, DType::kFp32, {P, R / 2}),
                       s = Tensor(Device::kCpu, DType::kFp32, {P, R / 2});
          rope_table(10000.0, c, s);
          std::vector<std::int32_t> p;
          for (std::int64_t t = 0; t < T; ++t)
            p.push_back(static_cast<std::int32_t>(uniform_int(rng, 0, P - 1)));
          const Tensor positions = int32_tensor(p);
          const std::int64_t N = 5 + H * (R + 3), M = 2 + H * (R + 128);
          const Tensor x = random_normal(rng, DType::kBf16, {T, N}),
                       out = cpu_output(DType::kBf16, {T, M}),
                       d_x = cpu_output(DType::kBf16, {T, N});
          const TensorView gpu_c = on_gpu(c), gpu_s = on_gpu(s), gpu_p = on_gpu(positions),
                           gpu_x = on_gpu(x), gpu_out = gpu_output(DType::kBf16, {T, M}),
                           gpu_d_x = gpu_output(DType::kBf16, {T, N});
          rope_columns(cpu, {x, 5, R + 3}, H, pairs, positions, c, s, {out, 2, R + 128});
          rope_columns(gpu, {gpu_x, 5, R + 3}, H, pairs, gpu_p, gpu_c, gpu_s,
                       {gpu_out, 2, R + 128});
          expect_same(out, gpu_out, "rope" + text(T, R));
          rope_columns_backward(cpu, {out, 2, R + 128}, H, pairs, positions, c, s, {d_x, 4, R + 3});
          rope_columns_backward(gpu, {gpu_out, 2, R + 128}, H, pairs, gpu_p, gpu_c, gpu_s,
                                {gpu_d_x, 4, R + 3});
          expect_same(d_x, gpu_d_x, "rope backward" + text(T, R));
        }
}

}  // namespace
}  // namespace lockstep::ops::test

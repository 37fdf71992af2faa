#include "ops/cuda/gemm_fp8.h"
#include "ops/cuda/gemm_fp8_launch.cuh"

namespace lockstep::ops::cuda {

void fp8_gemm(const Context& ctx, const Fp8Rows& a, const Fp8Weight& b,
              const TensorView& offsets_E1, const TensorView& d_MN) {
  const std::int64_t M = a.codes_MK.dim(0), K = a.codes_MK.dim(1);
  const std::int64_t E = b.codes_ENK.dim(0), N = b.codes_ENK.dim(1);
  LOCKSTEP_CHECK(K % 16 == 0 && N % 16 == 0,
                 "fp8_gemm on a GPU: N {} and K {} must be multiples of 16", N, K);
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  LOCKSTEP_CHECK(M < kMost && N < kMost && K < kMost && b.scales.count() < kMost,
                 "fp8_gemm: M {} N {} K {} E {}", M, N, K, E);
  if (M == 0 || N == 0) return;
  if (K == 0) {
    tensor::check_cuda(cudaMemsetAsync(d_MN.data, 0, d_MN.bytes(), stream_of(ctx)), "fp8_gemm");
    return;
  }
  GemmOperands in{a, b, {}};
  in.x.a_scales = a.scales.as<float>();
  in.x.b_scales = b.scales.as<float>();
  in.x.offsets = offsets_E1 ? offsets_E1.as<std::int32_t>() : nullptr;
  in.x.d = d_MN.data;
  in.x.experts = static_cast<int>(E);
  in.x.M = static_cast<int>(M);
  in.x.N = static_cast<int>(N);
  in.x.K = static_cast<int>(K);
  in.x.bf16 = d_MN.dtype == tensor::DType::kBf16;
  const GemmPlan plan = plan_gemm(E, M, N, K);
  if (a.scaling == Scaling::kBlock)
    launch_block_scaled(ctx, in, plan);
  else
    launch_row_scaled(ctx, in, plan);
}

}  // namespace lockstep::ops::cuda

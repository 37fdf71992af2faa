#include "ops/cuda/gemm_fp8_launch.cuh"

namespace lockstep::ops::cuda {

void launch_block_scaled(const Context& ctx, const GemmOperands& in, GemmPlan plan) {
  launch_types<Scaling::kBlock>(ctx, in, plan);
}

}  // namespace lockstep::ops::cuda

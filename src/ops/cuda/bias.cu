#include "numerics/reduce.h"
#include "ops/cuda/bias.h"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/norm.cuh"

namespace lockstep::ops::cuda {
namespace {

using numerics::Bf16;
using numerics::to_float;

// The widths are those of padded projections, small against the products around them.
__global__ void add_bias_kernel(const float* x, const Bf16* bias, Bf16* out, std::int64_t n,
                                std::int64_t N) {
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += stride)
    out[i] = numerics::to_bf16(x[i] + to_float(bias[i % N]));
}

// A thread a column of a block of 128 rows.
__global__ void bias_blocks_kernel(const Bf16* dy, std::int64_t T, std::int64_t N,
                                   float* partial_BN) {
  const std::int64_t n = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (n >= N) return;
  const std::int64_t begin = std::int64_t{blockIdx.y} * numerics::kRowBlock;
  float acc = 0.0f;
#pragma unroll 8
  for (std::int64_t t = begin; t < min(begin + numerics::kRowBlock, T); ++t)
    acc = acc + to_float(dy[t * N + n]);
  partial_BN[blockIdx.y * N + n] = acc;
}

__global__ void clip_kernel(Bf16* x, std::int64_t n, Bf16 limit, Bf16 low) {
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += stride) {
    const float v = to_float(x[i]);
    if (v > to_float(limit)) x[i] = limit;
    if (v < to_float(low)) x[i] = low;
  }
}

__global__ void clip_backward_kernel(const Bf16* x, std::int64_t n, float limit, Bf16* d) {
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += stride) {
    const float v = to_float(x[i]);
    if (v >= limit || v <= -limit) d[i] = Bf16{0};
  }
}

}  // namespace

void add_bias(const Context& ctx, const TensorView& x_TN, const TensorView& bias_N,
              const TensorView& out_TN) {
  const std::int64_t n = x_TN.count();
  if (n == 0) return;
  const Grid grid = elementwise_grid(n);
  add_bias_kernel<<<grid.blocks, grid.threads, 0, stream_of(ctx)>>>(
      x_TN.as<float>(), bias_N.as<Bf16>(), out_TN.as<Bf16>(), n, x_TN.dim(1));
  LOCKSTEP_CUDA_LAUNCHED("add_bias");
}

void bias_backward(const Context& ctx, const TensorView& dy_TN, const TensorView& d_bias_N) {
  const std::int64_t T = dy_TN.dim(0), N = dy_TN.dim(1);
  if (N == 0) return;
  const std::int64_t blocks = (T + numerics::kRowBlock - 1) / numerics::kRowBlock;
  const tensor::ArenaScope scope(*ctx.workspace);
  float* partial = ctx.workspace->take(tensor::DType::kFp32, {blocks, N}).as<float>();
  if (T > 0) {
    const dim3 grid(static_cast<unsigned>((N + 63) / 64), static_cast<unsigned>(blocks));
    bias_blocks_kernel<<<grid, 64, 0, stream_of(ctx)>>>(dy_TN.as<Bf16>(), T, N, partial);
    LOCKSTEP_CUDA_LAUNCHED("bias_backward");
  }
  add_row_blocks(ctx, partial, blocks, N, d_bias_N.as<float>());
}

void clip(const Context& ctx, const TensorView& x, Bf16 limit) {
  const std::int64_t n = x.count();
  if (n == 0) return;
  const Grid grid = elementwise_grid(n);
  clip_kernel<<<grid.blocks, grid.threads, 0, stream_of(ctx)>>>(
      x.as<Bf16>(), n, limit, numerics::to_bf16(-to_float(limit)));
  LOCKSTEP_CUDA_LAUNCHED("clip");
}

void clip_backward(const Context& ctx, const TensorView& x, Bf16 limit, const TensorView& d) {
  const std::int64_t n = x.count();
  if (n == 0) return;
  const Grid grid = elementwise_grid(n);
  clip_backward_kernel<<<grid.blocks, grid.threads, 0, stream_of(ctx)>>>(
      x.as<Bf16>(), n, to_float(limit), d.as<Bf16>());
  LOCKSTEP_CUDA_LAUNCHED("clip_backward");
}

}  // namespace lockstep::ops::cuda

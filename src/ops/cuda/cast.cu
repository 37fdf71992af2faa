#include "ops/cuda/cast.h"
#include "ops/cuda/launch.cuh"

namespace lockstep::ops::cuda {
namespace {

using numerics::Bf16;

__device__ void convert(Bf16 x, float& y) { y = numerics::to_float(x); }
__device__ void convert(float x, Bf16& y) { y = numerics::to_bf16(x); }

template <typename From, typename To>
__global__ void cast_kernel(const From* from, To* to, std::int64_t n) {
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += stride)
    convert(from[i], to[i]);
}

}  // namespace

void cast(const Context& ctx, const TensorView& from, const TensorView& to) {
  const std::int64_t n = from.count();
  if (n == 0) return;
  const Grid grid = elementwise_grid(n);
  if (from.dtype == tensor::DType::kBf16)
    cast_kernel<<<grid.blocks, grid.threads, 0, stream_of(ctx)>>>(from.as<Bf16>(), to.as<float>(),
                                                                  n);
  else
    cast_kernel<<<grid.blocks, grid.threads, 0, stream_of(ctx)>>>(from.as<float>(), to.as<Bf16>(),
                                                                  n);
  LOCKSTEP_CUDA_LAUNCHED("cast");
}

}  // namespace lockstep::ops::cuda

// What the two norms' CUDA files share.
#pragma once

#include "numerics/contract.h"
#include "ops/cuda/rows.cuh"
#include "ops/operand.h"

namespace lockstep::ops::cuda {

__device__ inline float reciprocal_rms(float sum, std::int64_t n, float eps) {
  return 1.0f / sqrtf(sum / static_cast<float>(n) + eps);
}

// The factor of -x in the norm's backward, from t = sum of (dh*w) * x.
__device__ inline float backward_factor(float t, float rstd, std::int64_t n) {
  return ((t * rstd) * (rstd * rstd)) / static_cast<float>(n);
}

// A row is spread over kWarps warps side by side, each with `groups` times 32 chunks in registers.
// A lane's accumulator goes from warp to warp, so that its chunks are added in ascending order.
template <int kWarps, typename Add>
__device__ float row_sum(Add add) {
  if constexpr (kWarps == 1) {
    return butterfly_sum(add(0.0f));
  } else {
    __shared__ float lanes[32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) {
      if (warp == w) lanes[lane] = add(w == 0 ? 0.0f : lanes[lane]);
      __syncthreads();
    }
    return butterfly_sum(lanes[lane]);
  }
}

struct Row {
  std::int64_t t;
  int chunk;  // the lane's first; the next are 32 further on
  int end;    // of this warp's chunks
};

template <int kWarps>
__device__ Row my_row(std::int64_t D) {
  const int chunks = static_cast<int>(D / 8), groups = (chunks + 31) / 32;
  const int per_warp = (groups + kWarps - 1) / kWarps * 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if constexpr (kWarps == 1)
    return {std::int64_t{blockIdx.x} * (blockDim.x / 32) + warp, lane, chunks};
  const int begin = warp * per_warp;
  return {blockIdx.x, begin + lane, min(chunks, begin + per_warp)};
}

// A kernel in which kWarps warps take a row.
template <int kWarps, typename Args>
void launch_rows(const Args& a, void (*kernel)(Args), cudaStream_t stream) {
  const int warps = kWarps > 1 ? kWarps : a.T < 4 * kMultiprocessors ? 1 : 4;
  const unsigned blocks = blocks_for(a.T, kWarps > 1 ? 1 : warps);
  kernel<<<blocks, 32 * warps, 0, stream>>>(a);
}

// dw_N = dw_N + the sum of the blocks' shares partial_BN in ascending order from +0.
void add_row_blocks(const Context& ctx, const float* partial_BN, std::int64_t blocks,
                    std::int64_t n, float* dw_N);

}  // namespace lockstep::ops::cuda

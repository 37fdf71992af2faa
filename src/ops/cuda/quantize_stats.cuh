// QuantStats in device memory: a thread counts in registers, a CTA adds once at its end. Integers
// and extrema, so the order of the atomics leaves no trace. `saturated` stays as it is: with
// s = amax / 448 rounded to nearest no product reaches 449.
#pragma once

#include "ops/cuda/quantize_block.cuh"

namespace lockstep::ops::cuda {

struct ThreadStats {
  unsigned values = 0, flushed = 0, blocks = 0, zero_blocks = 0, nonfinite_blocks = 0;
  std::uint32_t amax_min = 0xFFFFFFFFu, amax_max = 0;

  __device__ void count_block(std::uint32_t amax) {
    ++blocks;
    const bool finite = amax < 0x7F800000u;
    zero_blocks += amax == 0 ? 1 : 0;
    nonfinite_blocks += finite ? 0 : 1;
    if (amax != 0 && finite) {
      amax_min = min(amax_min, amax);
      amax_max = max(amax_max, amax);
    }
  }
};

__device__ inline void atomic_add(std::int64_t* to, unsigned value) {
  if (value != 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

// Every thread of the CTA calls it once.
__device__ inline void flush_stats(const ThreadStats& s, QuantStats* stats) {
  __shared__ unsigned sums[5];
  __shared__ std::uint32_t extrema[2];
  if (threadIdx.x < 5) sums[threadIdx.x] = 0;
  if (threadIdx.x == 0) extrema[0] = 0xFFFFFFFFu, extrema[1] = 0;
  __syncthreads();
  const unsigned mine[5] = {s.values, s.flushed, s.blocks, s.zero_blocks, s.nonfinite_blocks};
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    const unsigned sum = __reduce_add_sync(kAllLanes, mine[i]);
    if (threadIdx.x % 32 == 0 && sum != 0) atomicAdd(&sums[i], sum);
  }
  const std::uint32_t low = __reduce_min_sync(kAllLanes, s.amax_min);
  const std::uint32_t high = __reduce_max_sync(kAllLanes, s.amax_max);
  if (threadIdx.x % 32 == 0) {
    atomicMin(&extrema[0], low);
    atomicMax(&extrema[1], high);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  atomic_add(&stats->values, sums[0]);
  atomic_add(&stats->flushed_to_zero, sums[1]);
  atomic_add(&stats->blocks, sums[2]);
  atomic_add(&stats->zero_blocks, sums[3]);
  atomic_add(&stats->nonfinite_blocks, sums[4]);
  if (extrema[1] == 0) return;
  atomicMax(reinterpret_cast<unsigned*>(&stats->amax_max), extrema[1]);
  auto* lowest = reinterpret_cast<unsigned*>(&stats->amax_min);  // 0: none so far
  if (atomicCAS(lowest, 0u, extrema[0]) != 0) atomicMin(lowest, extrema[0]);
}

}  // namespace lockstep::ops::cuda

// What the CUDA files of ops share: launch sizes and warp sums in the orders of docs/numerics.md,
// section 3.
#pragma once

#include "numerics/math.h"
#include "tensor/cuda_check.h"

namespace lockstep::ops::cuda {

using tensor::stream_of;

inline constexpr int kMultiprocessors = 132;  // H100 and H200 (SXM)

struct Grid {
  unsigned blocks, threads;
};

// For loops in which a thread strides over n elements.
inline Grid elementwise_grid(std::int64_t n, int threads = 256) {
  const std::int64_t wanted = (n + threads - 1) / threads;
  const std::int64_t most = std::int64_t{kMultiprocessors} * 16;
  return {static_cast<unsigned>(wanted < most ? wanted : most), static_cast<unsigned>(threads)};
}

// lane[l] = lane[l] + lane[l ^ d], d = 16, 8, 4, 2, 1: every lane of the warp ends with the same
// bits.
template <typename T>
__device__ inline T butterfly_sum(T lane) {
#pragma unroll
  for (int d = 16; d >= 1; d /= 2) lane = lane + __shfl_xor_sync(0xFFFFFFFFu, lane, d);
  return lane;
}

}  // namespace lockstep::ops::cuda

// Rows of BF16 on a warp: 16-byte chunks of eight neighbouring values, chunk c on lane c % 32,
// which is the order of lane_sum (docs/numerics.md, section 3).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "ops/cuda/launch.cuh"

namespace lockstep::ops::cuda {

using numerics::Bf16;

inline constexpr unsigned kFullWarp = 0xFFFFFFFFu;

// to_bf16 of two values, `low` in the low half. One instruction, the same bits for every input
// (tests/gpu/bf16_pair_test.cu).
__device__ inline std::uint32_t bf16_pair(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ inline void unpack_pair(std::uint32_t pair, float& low, float& high) {
  low = numerics::bits_float(pair << 16);
  high = numerics::bits_float(pair & 0xFFFF0000u);
}

__device__ inline void unpack(const uint4& chunk, float (&v)[8]) {
  unpack_pair(chunk.x, v[0], v[1]);
  unpack_pair(chunk.y, v[2], v[3]);
  unpack_pair(chunk.z, v[4], v[5]);
  unpack_pair(chunk.w, v[6], v[7]);
}

__device__ inline uint4 pack(const float (&v)[8]) {
  return {bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]),
          bf16_pair(v[6], v[7])};
}

__device__ inline std::int32_t clamp_index(std::int32_t i, std::int64_t end) {
  const auto last = static_cast<std::int32_t>(end - 1);
  return i < 0 ? 0 : (i > last ? last : i);
}

// Whether 16-byte accesses reach every row: all pointers (null counts) and the row length allow it.
template <typename... Pointers>
bool in_chunks(std::int64_t row_length, const Pointers*... pointers) {
  const std::uintptr_t bits = (reinterpret_cast<std::uintptr_t>(pointers) | ... | 0u);
  return row_length % 8 == 0 && bits % 16 == 0;
}

inline unsigned blocks_for(std::int64_t items, std::int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace lockstep::ops::cuda

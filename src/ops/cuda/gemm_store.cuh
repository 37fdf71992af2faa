// How results leave registers: NaN as the contract writes it, and a warpgroup's values by way of
// shared memory and the copy engine, so that device memory sees whole lines and nobody waits.
#pragma once

#include "numerics/formats.h"
#include "ops/cuda/ptx.cuh"

namespace lockstep::ops::cuda {

// GEMMs store NaN as 0x7FC00000.
__device__ __forceinline__ float canonical(float x) {
  return x == x ? x : numerics::bits_float(0x7FC00000u);
}
__device__ __forceinline__ void store_pair(float* to, float low, float high) {
  *reinterpret_cast<float2*>(to) = make_float2(canonical(low), canonical(high));
}
__device__ __forceinline__ void store_pair(numerics::Bf16* to, float low, float high) {
  *reinterpret_cast<std::uint32_t*>(to) = pack_bf16(low, high);
}
__device__ __forceinline__ void store_one(float* to, float x) { *to = canonical(x); }
__device__ __forceinline__ void store_one(numerics::Bf16* to, float x) {
  *to = numerics::to_bf16(x);
}

// Boxes of 64 rows of 128 bytes, as a store's tensor map has them (swizzle 128 bytes).
inline constexpr int kStoreBoxRows = 64;
inline constexpr int kStoreBoxBytes = kStoreBoxRows * 128;
template <typename Output>
inline constexpr int kStoreBoxColumns = 128 / static_cast<int>(sizeof(Output));

// A thread's pair number (h, j) of a box and where it lies: row lane / 4 + 8 h of the warp's 16,
// columns 8 j + 2 (lane % 4) + {0, 1}. In FP32 odd rows have columns j ^ 2 instead, so that half a
// warp's accesses of 8 bytes hit no bank twice; in BF16 a warp's of 4 bytes do not anyway.
template <typename Output>
__device__ __forceinline__ std::uint32_t place_in_box(std::uint32_t box, int h, int j) {
  const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4 + 8 * h;
  const int byte = (8 * j + 2 * (lane % 4)) * static_cast<int>(sizeof(Output));
  const int odd = sizeof(Output) == 4 ? lane / 4 % 2 * 64 : 0;
  return box + static_cast<std::uint32_t>(row * 128 + (byte ^ (lane / 4 * 16) ^ odd));
}
// That pair of box b among a thread's values of wgmma's D.
template <typename Output, int kCount>
__device__ __forceinline__ float2 pair_of_box(const float (&values)[kCount], int b, int h, int j) {
  const int first = 4 * (b * kStoreBoxColumns<Output> / 8) + 2 * h;
  const float2 even = make_float2(values[first + 4 * j], values[first + 4 * j + 1]);
  if constexpr (sizeof(Output) != 4) {
    return even;
  } else {
    const float2 odd = make_float2(values[first + 4 * (j ^ 2)], values[first + 4 * (j ^ 2) + 1]);
    return threadIdx.x / 4 % 2 == 0 ? even : odd;
  }
}
__device__ __forceinline__ void put_pair(std::uint32_t at, float low, float high, float /*type*/) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(canonical(low)),
               "f"(canonical(high))
               : "memory");
}
__device__ __forceinline__ void put_pair(std::uint32_t at, float low, float high,
                                         numerics::Bf16 /*type*/) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(pack_bf16(low, high)) : "memory");
}
__device__ __forceinline__ float2 take_pair(std::uint32_t at) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at) : "memory");
  return v;
}

// Stores a warpgroup's values (wgmma's D, 64 x 2 kCount) at column x, row y, slab z of the map, by
// way of kBoxes boxes at `buffer` that belong to the warpgroup; groups of kGroup boxes are on their
// way at a time. `barrier`: a named barrier of the warpgroup's own.
template <typename Output, int kBoxes, int kGroup, int kCount>
__device__ __forceinline__ void store_through_boxes(const CUtensorMap* map, std::uint32_t buffer,
                                                    int barrier, int x, int y, int z,
                                                    const float (&values)[kCount]) {
  constexpr int kColumns = kStoreBoxColumns<Output>, kAll = 2 * kCount / kColumns;
  static_assert(kBoxes % kGroup == 0 && kAll % kGroup == 0);
  const bool leader = threadIdx.x % 128 == 0;
#pragma unroll
  for (int first = 0; first < kAll; first += kGroup) {
    if (leader) tma_store_wait_read<kBoxes / kGroup - 1>();
    named_sync(barrier, 128);
#pragma unroll
    for (int b = first; b < first + kGroup; ++b) {
      const std::uint32_t box = buffer + static_cast<std::uint32_t>(b % kBoxes * kStoreBoxBytes);
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 pair = pair_of_box<Output>(values, b, h, j);
          put_pair(place_in_box<Output>(box, h, j), pair.x, pair.y, Output{});
        }
    }
    fence_async_shared();
    named_sync(barrier, 128);
    if (leader) {
#pragma unroll
      for (int b = first; b < first + kGroup; ++b)
        tma_store_3d(map, buffer + static_cast<std::uint32_t>(b % kBoxes * kStoreBoxBytes),
                     x + b * kColumns, y, z);
      tma_store_commit();
    }
  }
}
// Before the block ends: its shared memory has been read.
__device__ __forceinline__ void finish_stores() {
  if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();
}

}  // namespace lockstep::ops::cuda

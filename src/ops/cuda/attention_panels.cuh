// Tiles of attention's wgmma kernels in shared memory: panels of 64 columns, 128 bytes a row, in
// the layout of TMA's 128-byte swizzle.
#pragma once

#include "ops/cuda/attention_parts.cuh"
#include "ops/cuda/wgmma.cuh"

namespace lockstep::ops::cuda {

// Where 16 bytes of a row lie; chunk counts them along the row.
template <int kPanelBytes>
__device__ __forceinline__ std::uint32_t panel_at(std::uint32_t base, int row, int chunk) {
  return base + chunk / 8 * kPanelBytes + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
}

// Rows [first, first + kRows) of a head's matrix by one warp, zeros from `end` on, where TMA would
// bring what belongs to other sequences or to nobody.
template <int kWidth, int kRows>
__device__ inline void load_last_rows(const Bf16* from, std::int64_t stride, int first, int end,
                                      std::uint32_t to) {
  constexpr int kLanes = kWidth / 8;
  const int lane = static_cast<int>(threadIdx.x) % 32, chunk = lane % kLanes;
#pragma unroll 4
  for (int r = lane / kLanes; r < kRows; r += 32 / kLanes) {
    const bool present = first + r < end;
    copy_async(panel_at<kRows * 128>(to, r, chunk),
               from + (present ? first + r : 0) * stride + chunk * 8, present);
  }
}
// Before the consumers are told of it.
__device__ inline void finish_last_rows() {
  copy_commit();
  copy_wait<0>();
  fence_async_shared();
  __syncwarp();
}

// By one warp, a block of values at position `block`: rows from `end` on, which may hold anything,
// become zeros; what is not finite in those from `late` on, which not all rows of the tile see,
// goes to `broken`.
template <int kPanels>
__device__ inline void check_values(std::uint32_t values, int late, int block, int end,
                                    const BrokenValues& broken) {
  const int from = late > 0 ? late : 0, lane = static_cast<int>(threadIdx.x) % 32;
  for (int panel = 0; panel < kPanels; ++panel)
#pragma unroll 2
    for (int i = from * 8 + lane; i < kBlock * 8; i += 32) {
      const int row = i / 8;
      const std::uint32_t at = values + panel * kBlock * 128 + i * 16;
      if (block + row < end)
        broken.check(at, block + row, panel * 64 + ((i % 8) ^ (row % 8)) * 8);
      else
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
    }
}

// 64 rows of a warpgroup's accumulator times `scale` to rows [first, ..) of a head's BF16 matrix,
// through 16 rows a warp of shared memory in the swizzled layout (panels kPanelBytes apart).
template <int kWidth, int kPanelBytes>
__device__ inline void store_rows(const float (&d)[kWidth / 2], const float (&factor)[2],
                                  std::uint32_t memory, Bf16* to, std::int64_t stride, int first,
                                  int end) {
  const int lane = static_cast<int>(threadIdx.x) % 32,
            warp = static_cast<int>(threadIdx.x) / 32 % 4;
  const std::uint32_t mine = memory + warp * 16 * 128;
#pragma unroll
  for (int i = 0; i < kWidth / 16; ++i) {
    const int r = lane % 16, chunk = i * 2 + lane / 16;
    store_matrix_x4(panel_at<kPanelBytes>(mine, r, chunk),
                    pack_bf16(d[8 * i] * factor[0], d[8 * i + 1] * factor[0]),
                    pack_bf16(d[8 * i + 2] * factor[1], d[8 * i + 3] * factor[1]),
                    pack_bf16(d[8 * i + 4] * factor[0], d[8 * i + 5] * factor[0]),
                    pack_bf16(d[8 * i + 6] * factor[1], d[8 * i + 7] * factor[1]));
  }
  __syncwarp();
  constexpr int kLanes = kWidth / 8;
#pragma unroll
  for (int i = 0; i < 16; i += 32 / kLanes) {
    const int r = i + lane / kLanes, chunk = lane % kLanes, row = first + warp * 16 + r;
    const uint4 value = load_shared_16(panel_at<kPanelBytes>(mine, r, chunk));
    if (row < end) *reinterpret_cast<uint4*>(to + row * stride + chunk * 8) = value;
  }
}

}  // namespace lockstep::ops::cuda

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

// Rows [0, kRows) of a tile by one warp: row_of(r) is the row of a head's matrix that row r is, -1
// one that becomes zeros, where TMA would bring what belongs to other sequences or to nobody.
template <int kWidth, int kRows, typename RowOf>
__device__ inline void load_some_rows(const Bf16* from, std::int64_t stride, std::uint32_t to,
                                      const RowOf& row_of) {
  constexpr int kLanes = kWidth / 8;
  const int lane = static_cast<int>(threadIdx.x) % 32, chunk = lane % kLanes;
#pragma unroll 4
  for (int r = lane / kLanes; r < kRows; r += 32 / kLanes) {
    const int row = row_of(r);
    copy_async(panel_at<kRows * 128>(to, r, chunk), from + (row < 0 ? 0 : row) * stride + chunk * 8,
               row >= 0);
  }
}
// Rows [first, first + kRows), zeros from `end` on.
template <int kWidth, int kRows>
__device__ inline void load_last_rows(const Bf16* from, std::int64_t stride, int first, int end,
                                      std::uint32_t to) {
  load_some_rows<kWidth, kRows>(from, stride, to,
                                [&](int r) { return first + r < end ? first + r : -1; });
}
// Before the consumers are told of it.
__device__ inline void finish_last_rows() {
  copy_commit();
  copy_wait<0>();
  fence_async_shared();
  __syncwarp();
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

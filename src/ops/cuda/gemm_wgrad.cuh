// What the weight gradients share: tiles of one expert's d[n, k], computed by warpgroups of 64 rows
// each, and how they reach d. A warp of its own brings d's old values to shared memory while the
// tile is computed, and takes the sums away while the next one is.
#pragma once

#include "ops/cuda/gemm_ring.cuh"
#include "ops/cuda/gemm_store.cuh"
#include "ops/cuda/tensor_map.h"
#include "ops/cuda/wgmma.cuh"

namespace lockstep::ops::cuda {

struct WeightGradient {
  const std::int32_t *offsets_E1, *padded_offsets_E1;  // offsets null: one group of M rows
  float* d_ENK;
  int experts, M, N, K;
};

struct WgradPlace {
  int expert, row, column;  // of d
};

struct WgradTile {
  static constexpr int kWarpgroups = 2;  // that multiply, 64 rows each
  static constexpr int kRows = 64 * kWarpgroups, kColumns = 128;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kRegisters = 232, kOtherRegisters = 40;
  static constexpr int kValues = kColumns / 2;  // of a thread
  // A warpgroup's results in shared memory.
  static constexpr int kBoxes = kColumns / kStoreBoxColumns<float>;
  static constexpr int kBoxBytes = kBoxes * kStoreBoxBytes;
  static constexpr int kShared = kRingSlack + kWarpgroups * kBoxBytes;  // beside the stages
  static constexpr int kStageMemory = kSharedMemory - kShared;

  __host__ __device__ static int count(const WeightGradient& x) {
    return x.experts * ((x.N + kRows - 1) / kRows) * ((x.K + kColumns - 1) / kColumns);
  }
  // Tiles expert by expert, in bands of 1024 rows, so that tiles at work at one time share
  // operands.
  __device__ static WgradPlace place(const WeightGradient& x, int tile) {
    constexpr int kBand = 1024 / kRows;
    const int row_tiles = (x.N + kRows - 1) / kRows;
    const int column_tiles = (x.K + kColumns - 1) / kColumns;
    const int expert = tile / (row_tiles * column_tiles);
    const int local = tile - expert * row_tiles * column_tiles;
    const int band = local / (kBand * column_tiles);
    const int height = min(kBand, row_tiles - band * kBand);
    const int rest = local - band * kBand * column_tiles;
    return {expert, (band * kBand + rest % height) * kRows, rest / height * kColumns};
  }
};

// The boxes of one warpgroup and their two barriers: `ready`, the old values are there (or the
// boxes are free), and `done`, the results are.
struct WgradBoxes {
  std::uint32_t memory, ready, done;
  template <typename AnyRing>
  __device__ static WgradBoxes of(const AnyRing& ring, int warpgroup) {
    return {ring.end() + static_cast<std::uint32_t>(warpgroup * WgradTile::kBoxBytes),
            ring.own_barrier(2 * warpgroup), ring.own_barrier(2 * warpgroup + 1)};
  }
  __device__ void init() const {
    mbarrier_init(ready, 1);
    mbarrier_init(done, 4);
  }
};

// The warp that moves the results of warpgroup `warpgroup`; one thread.
template <bool kAccumulate>
__device__ void move_results(const WeightGradient& x, const CUtensorMap* d_map,
                             const WgradBoxes& boxes, int warpgroup) {
  std::uint32_t parity = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < WgradTile::count(x);
       tile += static_cast<int>(gridDim.x), parity ^= 1) {
    const WgradPlace place = WgradTile::place(x, tile);
    const auto box = [&](int b) {
      return boxes.memory + static_cast<std::uint32_t>(b * kStoreBoxBytes);
    };
    const auto column = [&](int b) { return place.column + b * kStoreBoxColumns<float>; };
    const int row = place.row + warpgroup * kStoreBoxRows;
    if constexpr (kAccumulate) {
      mbarrier_arrive_expect(boxes.ready, WgradTile::kBoxBytes);
      for (int b = 0; b < WgradTile::kBoxes; ++b)
        tma_load_3d(box(b), d_map, boxes.ready, column(b), row, place.expert, L2Hint::kEvictFirst);
    } else {
      mbarrier_arrive(boxes.ready);
    }
    mbarrier_wait(boxes.done, parity);
    for (int b = 0; b < WgradTile::kBoxes; ++b)
      tma_store_3d(d_map, box(b), column(b), row, place.expert, L2Hint::kEvictFirst);
    tma_store_commit();
    tma_store_wait_read<0>();
  }
}

// A warpgroup's results to its boxes, added to what is there or to +0 (a scale can make an acc -0).
// Each thread has its own places.
template <bool kAdd>
__device__ __forceinline__ void put_results(const WgradBoxes& boxes,
                                            const float (&acc)[WgradTile::kValues]) {
#pragma unroll
  for (int b = 0; b < WgradTile::kBoxes; ++b)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const std::uint32_t at = place_in_box<float>(
            boxes.memory + static_cast<std::uint32_t>(b * kStoreBoxBytes), h, j);
        const float2 pair = pair_of_box<float>(acc, b, h, j);
        float2 old = make_float2(0.0f, 0.0f);
        if constexpr (kAdd) old = take_pair(at);
        put_pair(at, old.x + pair.x, old.y + pair.y, 0.0f);
      }
}
__device__ __forceinline__ void give_boxes(const WgradBoxes& boxes) {
  fence_async_shared();
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(boxes.done);
}

inline CUtensorMap wgrad_output_map(const WeightGradient& x) {
  return tensor_map(x.d_ENK, tensor::DType::kFp32,
                    {{x.K, 4, kStoreBoxColumns<float>},
                     {x.N, std::int64_t{x.K} * 4, kStoreBoxRows},
                     {x.experts, std::int64_t{x.N} * x.K * 4, 1}},
                    CU_TENSOR_MAP_SWIZZLE_128B, "output of a weight gradient");
}

}  // namespace lockstep::ops::cuda

// What the weight gradients share: tiles of one expert's d[n, k], computed by two warpgroups of 64
// rows each, and how they reach d. CTAs of a cluster have neighbouring tiles and load operands for
// each other. A warp of its own brings d's old values to shared memory while the tile is computed,
// and takes the sums away while the next one is.
#pragma once

#include <algorithm>

#include "ops/cuda/gemm_ring.cuh"
#include "ops/cuda/gemm_store.cuh"
#include "ops/cuda/launch.cuh"
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

  // A cluster of kClusterRows x kClusterColumns tiles, counted row by row: those of a row share
  // their rows of dy, those of a column their columns of x, each loads a part for all. A cluster
  // has its tiles from one number of `count`.
  static constexpr int kClusterRows = 1, kClusterColumns = 1;
  static constexpr int kCluster = kClusterRows * kClusterColumns;
  static constexpr int kFriends = kClusterRows + kClusterColumns - 1;  // that read what one loads
  static constexpr int kReleases = 4 * kWarpgroups * kFriends;         // of a stage

  __host__ __device__ static int count(const WeightGradient& x) {
    constexpr int kHeight = kRows * kClusterRows, kWidth = kColumns * kClusterColumns;
    return x.experts * ((x.N + kHeight - 1) / kHeight) * ((x.K + kWidth - 1) / kWidth);
  }
  // Tiles expert by expert, in bands of 1536 rows, so that tiles at work at one time share
  // operands.
  __device__ static WgradPlace place(const WeightGradient& x, int tile) {
    constexpr int kHeight = kRows * kClusterRows, kWidth = kColumns * kClusterColumns;
    constexpr int kBand = 1536 / kHeight;
    const int row_tiles = (x.N + kHeight - 1) / kHeight;
    const int column_tiles = (x.K + kWidth - 1) / kWidth;
    const int expert = tile / (row_tiles * column_tiles);
    const int local = tile - expert * row_tiles * column_tiles;
    const int band = local / (kBand * column_tiles);
    const int height = min(kBand, row_tiles - band * kBand);
    const int rest = local - band * kBand * column_tiles;
    const int rank = kCluster > 1 ? static_cast<int>(cluster_rank()) : 0;
    return {expert, (band * kBand + rest % height) * kHeight + rank / kClusterColumns * kRows,
            rest / height * kWidth + rank % kClusterColumns * kColumns};
  }
  __device__ static int first() { return static_cast<int>(blockIdx.x) / kCluster; }
  __device__ static int stride() { return static_cast<int>(gridDim.x) / kCluster; }
};

// This warp has read the stage: all who load to it are told.
__device__ __forceinline__ void release_to_friends(std::uint32_t empty) {
  using Tile = WgradTile;
  __syncwarp();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (Tile::kCluster > 1) {
    const int rank = static_cast<int>(cluster_rank());
    if (lane < Tile::kCluster && (lane / Tile::kClusterColumns == rank / Tile::kClusterColumns ||
                                  lane % Tile::kClusterColumns == rank % Tile::kClusterColumns))
      mbarrier_arrive_at(empty, static_cast<std::uint32_t>(lane));
  } else {
    if (lane == 0) mbarrier_arrive(empty);
  }
}

// A part of `part` rows of an operand's tile [kRows or kColumns, 128 bytes] at `to`, rows
// from `row`, bytes from `x`: for the tiles of this one's row or column of the cluster. One thread.
__device__ __forceinline__ void load_for_row(std::uint32_t to, const CUtensorMap* map,
                                             std::uint32_t barrier, int x, int row, int part) {
  using Tile = WgradTile;
  if constexpr (Tile::kClusterColumns > 1) {
    const int rank = static_cast<int>(cluster_rank());
    const int mine = rank % Tile::kClusterColumns * part;
    const int mask = ((1 << Tile::kClusterColumns) - 1)
                     << (rank / Tile::kClusterColumns * Tile::kClusterColumns);
    tma_load_2d_multicast(to + static_cast<std::uint32_t>(mine * 128), map, barrier,
                          static_cast<std::uint16_t>(mask), x, row + mine);
  } else {
    tma_load_2d(to, map, barrier, x, row);
  }
}
__device__ __forceinline__ void load_for_column(std::uint32_t to, const CUtensorMap* map,
                                                std::uint32_t barrier, int x, int row, int part) {
  using Tile = WgradTile;
  if constexpr (Tile::kClusterRows > 1) {
    const int rank = static_cast<int>(cluster_rank());
    const int mine = rank / Tile::kClusterColumns * part;
    int mask = 0;
    for (int r = 0; r < Tile::kClusterRows; ++r)
      mask |= 1 << (r * Tile::kClusterColumns + rank % Tile::kClusterColumns);
    tma_load_2d_multicast(to + static_cast<std::uint32_t>(mine * 128), map, barrier,
                          static_cast<std::uint16_t>(mask), x, row + mine);
  } else {
    tma_load_2d(to, map, barrier, x, row);
  }
}

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

// All threads, first and last in a kernel. `fills`: arrivals that fill a stage.
template <typename AnyRing>
__device__ __forceinline__ void start_wgrad(const AnyRing& ring, int fills) {
  if (threadIdx.x == 0) {
    for (int w = 0; w < WgradTile::kWarpgroups; ++w) WgradBoxes::of(ring, w).init();
  }
  ring.init(WgradTile::kReleases, fills);
  if constexpr (WgradTile::kCluster > 1) cluster_sync();
}
__device__ __forceinline__ void finish_wgrad() {
  __syncwarp();
  if constexpr (WgradTile::kCluster > 1) cluster_sync();  // others may still use our shared memory
}

// The warp that moves the results of warpgroup `warpgroup`; one thread.
template <bool kAccumulate>
__device__ void move_results(const WeightGradient& x, const CUtensorMap* d_map,
                             const WgradBoxes& boxes, int warpgroup) {
  std::uint32_t parity = 0;
  const int tiles = WgradTile::count(x);
  for (int tile = WgradTile::first(); tile < tiles; tile += WgradTile::stride(), parity ^= 1) {
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
      // The boxes are free late; the next tile's old values are on their way to the L2 cache.
      if (const int next = tile + WgradTile::stride(); next < tiles) {
        const WgradPlace behind = WgradTile::place(x, next);
        for (int b = 0; b < WgradTile::kBoxes; ++b)
          tma_prefetch_3d(d_map, behind.column + b * kStoreBoxColumns<float>,
                          behind.row + warpgroup * kStoreBoxRows, behind.expert,
                          L2Hint::kEvictFirst);
      }
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

// A warpgroup's results to its boxes: old + acc or acc.
template <bool kAccumulate>
__device__ __forceinline__ void give_results(const WgradBoxes& boxes, std::uint32_t parity,
                                             const float (&acc)[WgradTile::kValues]) {
  mbarrier_wait(boxes.ready, parity);
#pragma unroll
  for (int b = 0; b < WgradTile::kBoxes; ++b)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const std::uint32_t at = place_in_box<float>(
            boxes.memory + static_cast<std::uint32_t>(b * kStoreBoxBytes), h, j);
        const float2 pair = pair_of_box<float>(acc, b, h, j);
        if constexpr (kAccumulate) {
          const float2 old = take_pair(at);
          put_pair(at, old.x + pair.x, old.y + pair.y, 0.0f);
        } else {
          put_pair(at, pair.x, pair.y, 0.0f);
        }
      }
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

// As many clusters as run at a time, or as there are tiles for.
template <typename... Parameters, typename... Arguments>
void launch_wgrad(const Context& ctx, const char* what, void (*kernel)(Parameters...),
                  int shared_bytes, const WeightGradient& x, const Arguments&... arguments) {
  using Tile = WgradTile;
  allow_shared_memory(kernel, shared_bytes);
  cudaLaunchAttribute size{};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = Tile::kCluster;
  size.val.clusterDim.y = size.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(Tile::kThreads);
  config.gridDim = dim3(Tile::kCluster);
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = stream_of(ctx);
  config.attrs = &size;
  config.numAttrs = 1;
  // A cluster lies in one of the GPU's processor groups, whose sizes differ.
  int most = 0;
  tensor::check_cuda(cudaOccupancyMaxActiveClusters(&most, kernel, &config), what);
  const int clusters = std::min(Tile::count(x), std::max(most, 1));
  config.gridDim = dim3(static_cast<unsigned>(clusters * Tile::kCluster));
  tensor::check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

}  // namespace lockstep::ops::cuda

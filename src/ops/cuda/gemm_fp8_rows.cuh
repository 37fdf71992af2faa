// The FP8 GEMM for many rows an expert: D tiles of kConsumers * kWaves * 64 rows and kColumns
// columns.
//
// One warp loads blocks of 128 of the contraction into a ring (TMA, 128-byte swizzle); kConsumers
// warpgroups multiply. Warpgroup c has the 64-row slices c, c + kConsumers, ... of a tile, and
// slices without rows are left out. A block's part stays in the tensor core's accumulator for four
// steps and is then promoted into `sum` (docs/numerics.md, sections 4 and 6); the other warpgroups
// multiply meanwhile. Rows of the next expert may be loaded and multiplied; they are not stored.
//
// kCluster = 2 or 4: CTAs with neighbouring column tiles load the slices of A in turn, each for
// all.
#pragma once

#include "ops/cuda/gemm_fp8_common.cuh"

namespace lockstep::ops::cuda {

template <int kConsumers, int kWaves, int kColumns, int kCluster>
struct RowsShape {
  static constexpr int kTileRows = 64 * kConsumers * kWaves;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kABytes = kTileRows * 128;
  static constexpr int kBBytes = kColumns * 128;
  static constexpr int kStageBytes = kABytes + kBBytes;
  static constexpr int kScaleBytes = ScaleStage<kTileRows>::kBytes;
  static constexpr int kGroups = kColumns == 128 ? 1 : 2;  // scales of B that a tile meets
  static constexpr int kPiece = 64;                        // columns that are staged at a time
  static constexpr int kWarpStaging = 16 * kPiece * 2;     // BF16 results of a warp's 16 rows
  static constexpr int kStaging = 4 * kConsumers * kWarpStaging;
  static constexpr int kRowGroup = 2048 / kTileRows;  // row tiles that go together
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
};

// Stores 64 rows x kColumns of a warpgroup. `row` and `rows_left`: of this warp's first row.
template <int kColumns, int kPiece, bool kStream = false>
__device__ __forceinline__ void store_slice(const GemmArguments& x,
                                            const float (&sum)[kColumns / 2], std::uint32_t staging,
                                            std::int64_t row, int rows_left, int column) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (x.bf16) {
    // kPiece columns at a time; 16-byte parts of a row are permuted by the row's last bits against
    // bank conflicts.
    constexpr int kParts = kPiece / 8, kPitch = kPiece * 2;
    auto* out = static_cast<std::uint16_t*>(x.d) + row * x.N + column;
    const int to_row = lane % 16;
#pragma unroll
    for (int piece = 0; piece < kColumns / kPiece; ++piece) {
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kParts; j += 2) {
        const int part = (j + lane / 16) ^ (to_row & (kParts - 1));
        const float* v = sum + 4 * (piece * kParts + j);
        store_matrix_x4(staging + static_cast<std::uint32_t>(to_row * kPitch + part * 16),
                        pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                        pack_bf16(v[6], v[7]));
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 16 * kParts / 32; ++i) {
        const int index = i * 32 + lane, r = index / kParts, part = index % kParts;
        const uint4 v = load_shared_16(
            staging + static_cast<std::uint32_t>(r * kPitch + (part ^ (r & (kParts - 1))) * 16));
        const int n = piece * kPiece + part * 8;
        if (r < rows_left && column + n < x.N) {
          auto* to = reinterpret_cast<uint4*>(out + static_cast<std::int64_t>(r) * x.N + n);
          if constexpr (kStream) __stcs(to, v); else *to = v;
        }
      }
    }
  } else {
    auto* out = static_cast<float*>(x.d) + row * x.N + column;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = lane / 4 + 8 * h, n = 8 * j + 2 * (lane % 4);
        if (r < rows_left && column + n < x.N)
          *reinterpret_cast<float2*>(out + static_cast<std::int64_t>(r) * x.N + n) =
              make_float2(one_nan(sum[4 * j + 2 * h]), one_nan(sum[4 * j + 2 * h + 1]));
      }
  }
}

template <Fp8Type kA, Fp8Type kB, Scaling kScaling, int kConsumers, int kWaves, int kColumns,
          int kCluster>
__global__ void __launch_bounds__(128 * (kConsumers + 1), 1) __cluster_dims__(kCluster, 1, 1)
    fp8_rows_kernel(const __grid_constant__ CUtensorMap a_map,
                    const __grid_constant__ CUtensorMap b_map, const GemmArguments x) {
  using Shape = RowsShape<kConsumers, kWaves, kColumns, kCluster>;
  constexpr bool kBlock = kScaling == Scaling::kBlock;
  extern __shared__ __align__(1024) std::uint8_t shared[];
  const std::uint32_t stages = shared_address(shared);
  const std::uint32_t staging = stages + static_cast<std::uint32_t>(x.stages * Shape::kStageBytes);
  const std::uint32_t scales = staging + Shape::kStaging;
  Ring ring{scales + static_cast<std::uint32_t>(x.stages * Shape::kScaleBytes), x.stages};
  std::int32_t* lists =
      reinterpret_cast<std::int32_t*>(shared + (ring.barriers - stages) + 16 * x.stages);

  const int warp = warp_index(), lane = lane_index();
  if (threadIdx.x == 0) {
    tma_prefetch_map(&a_map);
    tma_prefetch_map(&b_map);
    for (int s = 0; s < x.stages; ++s) {
      mbarrier_init(ring.barriers + 8 * s, kBlock ? 33 : 1);  // TMA's, and the scales' 32 lanes
      mbarrier_init(ring.barriers + 8 * (x.stages + s), kConsumers * 4 * kCluster);
    }
    fence_barrier_init();
  }
  const RowTiles tiles =
      find_row_tiles<Shape::kTileRows>(lists, x.offsets, x.experts, x.M);  // synchronises
  if constexpr (kCluster > 1) cluster_sync();

  const int rank = kCluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int column_tiles = (x.N + kColumns * kCluster - 1) / (kColumns * kCluster);
  const int total = tiles.first_tile[x.experts] * column_tiles;
  const int first = static_cast<int>(blockIdx.x) / kCluster;
  const int stride = static_cast<int>(gridDim.x) / kCluster;
  const int blocks = (x.K + 127) / 128;

  if (warp >= 4 * kConsumers) {
    give_registers<Shape::kProducerRegisters>();
    if (warp == 4 * kConsumers && elect_one()) {
      for (int t = first; t < total; t += stride) {
        const RowTile tile = tile_at<Shape::kTileRows, Shape::kRowGroup>(tiles, column_tiles, t);
        const int column = (tile.column * kCluster + rank) * kColumns;
        const std::uint32_t bytes = static_cast<std::uint32_t>(tile.slices * 8192 + Shape::kBBytes);
        for (int g = 0; g < blocks; ++g, ring.advance()) {
          mbarrier_wait(ring.empty(), ring.phase ^ 1);
          mbarrier_arrive_expect(ring.full(), bytes);
          const std::uint32_t a =
              stages + static_cast<std::uint32_t>(ring.stage * Shape::kStageBytes);
          for (int s = rank; s < tile.slices; s += kCluster) {
            if constexpr (kCluster > 1)
              tma_load_2d_multicast(a + 8192 * s, &a_map, ring.full(), (1 << kCluster) - 1, 128 * g,
                                    tile.row + 64 * s);
            else
              tma_load_2d(a + 8192 * s, &a_map, ring.full(), 128 * g, tile.row + 64 * s);
          }
          tma_load_3d(a + Shape::kABytes, &b_map, ring.full(), 128 * g, column, tile.expert);
        }
      }
    }
    if (kBlock && warp == 4 * kConsumers + 1) {
      for (int t = first; t < total; t += stride) {
        const RowTile tile = tile_at<Shape::kTileRows, Shape::kRowGroup>(tiles, column_tiles, t);
        const int column = (tile.column * kCluster + rank) * kColumns;
        for (int g = 0; g < blocks; ++g, ring.advance()) {
          mbarrier_wait(ring.empty(), ring.phase ^ 1);
          ScaleStage<Shape::kTileRows>::copy(
              x, scales + static_cast<std::uint32_t>(ring.stage * Shape::kScaleBytes), g, tile.row,
              64 * tile.slices, tile.expert, column, Shape::kGroups);
          copies_arrive(ring.full());
        }
      }
    }
  } else {
    take_registers<Shape::kConsumerRegisters>();
    const int group = warp / 4;
    const std::uint32_t warp_staging =
        staging + static_cast<std::uint32_t>(warp * Shape::kWarpStaging);
    const std::uint32_t first_stage = operand_low(stages);
    float sum[kWaves][kColumns / 2], part[kColumns / 2];
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) part[i] = 0.0f;

    for (int t = first; t < total; t += stride) {
      const RowTile tile = tile_at<Shape::kTileRows, Shape::kRowGroup>(tiles, column_tiles, t);
      const int column = (tile.column * kCluster + rank) * kColumns;
      const int waves = (tile.slices - group + kConsumers - 1) / kConsumers;
      const int my_row = tile.row + 64 * group + 16 * (warp % 4);  // of wave 0, this warp
#pragma unroll
      for (int w = 0; w < kWaves; ++w)
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) sum[w][i] = 0.0f;

      const int first_group = 128 - column % 128;
      for (int g = 0; g < blocks; ++g, ring.advance()) {
        mbarrier_wait(ring.full(), ring.phase);
        const std::uint32_t stage =
            first_stage + static_cast<std::uint32_t>(ring.stage * (Shape::kStageBytes / 16));
        const std::uint32_t a_scale =
            scales + static_cast<std::uint32_t>(ring.stage * Shape::kScaleBytes);
        if (waves <= 0) release_stage<kCluster>(ring.empty(), lane);
#pragma unroll
        for (int w = 0; w < kWaves; ++w) {
          if (w >= waves) continue;
          start_block<kA, kB>(part, stage + 512 * (group + w * kConsumers),
                              stage + Shape::kABytes / 16);
          float s[Shape::kGroups][2];
          if constexpr (kBlock) {
            const std::uint32_t mine =
                a_scale + 4 * (64 * (group + w * kConsumers) + 16 * (warp % 4) + lane / 4);
#pragma unroll
            for (int c = 0; c < Shape::kGroups; ++c)
#pragma unroll
              for (int h = 0; h < 2; ++h)
                s[c][h] = __fmul_rn(load_shared_float(mine + 32 * h),
                                    load_shared_float(a_scale + 4 * (Shape::kTileRows + c)));
          }
          finish_block(part);
          if (w + 1 == waves) release_stage<kCluster>(ring.empty(), lane);
          if constexpr (kBlock) {
            promote<kColumns, Shape::kGroups>(part, s, first_group, sum[w]);
          } else {
#pragma unroll
            for (int i = 0; i < kColumns / 2; ++i) sum[w][i] = sum[w][i] + part[i];
          }
        }
      }

#pragma unroll
      for (int w = 0; w < kWaves; ++w) {
        if (w >= waves) continue;
        const int row = my_row + 64 * kConsumers * w;
        if constexpr (!kBlock)
          scale_rows<kColumns>(x, tile.expert, row + lane / 4, column + 2 * (lane % 4), sum[w]);
        store_slice<kColumns, Shape::kPiece>(x, sum[w], warp_staging, row, tile.end - row, column);
      }
    }
  }
  if constexpr (kCluster > 1) cluster_sync();  // the other CTA may still arrive at our barriers
}

}  // namespace lockstep::ops::cuda

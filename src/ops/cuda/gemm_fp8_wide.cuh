// The FP8 GEMM for many rows an expert: D tiles of 128 rows and 256 columns.
//
// One warp loads blocks of 128 of the contraction into a ring (TMA, 128-byte swizzle); two
// warpgroups multiply 64 rows each. A warpgroup reads its rows of a block into registers once and
// multiplies them with 64 columns at a time, whose part lies in one of two accumulators: one is
// promoted into `sum` (docs/numerics.md, sections 4 and 6) while the other is in the tensor core.
// A tile of 64 rows or fewer is the first warpgroup's alone. Rows of the next expert may be loaded
// and multiplied; they are not stored.
//
// kCluster = 2: two CTAs with neighbouring row tiles load half of the columns each, for both.
#pragma once

#include "ops/cuda/gemm_fp8_rows.cuh"
#include "ops/cuda/gemm_queue.cuh"

namespace lockstep::ops::cuda {

template <int kCluster>
struct WideShape {
  static constexpr int kConsumers = 2;
  static constexpr int kRows = 64 * kConsumers;     // of a CTA
  static constexpr int kTileRows = kRows * kCluster;  // of a cluster
  static constexpr int kColumns = 256;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kABytes = kRows * 128;
  static constexpr int kBBytes = kColumns * 128;
  static constexpr int kStageBytes = kABytes + kBBytes;
  static constexpr int kScaleBytes = ScaleStage<kRows>::kBytes;
  static constexpr int kPiece = 64;  // columns of a part
  static constexpr int kPieces = kColumns / kPiece;
  static constexpr int kWarpStaging = 16 * kPiece * 2;  // BF16 results of a warp's 16 rows
  static constexpr int kStaging = 4 * kConsumers * kWarpStaging;
  static constexpr int kRowGroup = 2048 / kTileRows;  // row tiles that go together
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kProducerRegisters = 40;
};

// The CTA's part of a cluster's tile, of which the first CTA has the odd slice.
struct WideTile {
  int expert, row, end, slices, column;
};
inline constexpr int kNoTile = -1;

template <int kCluster>
__device__ __forceinline__ void put_wide_tile(const TileQueue& queue, const RowTile& t) {
  const int first = (t.slices + kCluster - 1) / kCluster;
  for (int rank = 0; rank < kCluster; ++rank)
    queue.put(rank, make_int4(4 * t.expert + (rank == 0 ? first : t.slices - first),
                              t.row + 64 * first * rank, t.end,
                              t.column * WideShape<kCluster>::kColumns));
}
// The whole warp; false: there are no more.
__device__ __forceinline__ bool take_wide_tile(TileQueue& queue, int lane, WideTile& tile) {
  const int4 t = queue.take();
  __syncwarp();
  if (lane == 0) queue.taken();
  const int which = __reduce_max_sync(0xFFFFFFFFu, t.x);  // uniform, and known to be
  tile = {which / 4, t.y, t.z, which % 4, t.w};
  return which != kNoTile;
}

// part = the block's rows, in registers, times 64 columns; there after a wait.
template <Fp8Type kA, Fp8Type kB>
__device__ __forceinline__ void start_piece(float (&part)[32], const std::uint32_t (&a)[4][4],
                                            std::uint32_t b) {
  keep_registers(part);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma_fp8<kA, kB>(part, a[k], operand_of(b + 2 * k), k > 0);
  wgmma_commit();
  keep_registers(part);
}

template <Fp8Type kA, Fp8Type kB>
__device__ __forceinline__ void start_piece(float (&part)[32], std::uint32_t a, std::uint32_t b) {
  keep_registers(part);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k)
    wgmma_fp8<kA, kB>(part, operand_of(a + 2 * k), operand_of(b + 2 * k), k > 0);
  wgmma_commit();
  keep_registers(part);
}

// sum += part, each times its row's scale (rows + 8 h).
template <Scaling kScaling>
__device__ __forceinline__ void promote_piece(float (&part)[32], const float (&s)[2],
                                              float (&sum)[32]) {
  keep_registers(part);
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    if constexpr (kScaling == Scaling::kBlock)
      sum[i] = __fmaf_rn(part[i], s[i / 2 % 2], sum[i]);
    else
      sum[i] = sum[i] + part[i];
  }
}

template <Fp8Type kA, Fp8Type kB, Scaling kScaling, int kCluster, int kVariant = 0>
__global__ void __launch_bounds__(WideShape<kCluster>::kThreads, 1) __cluster_dims__(kCluster, 1, 1)
    fp8_wide_kernel(const __grid_constant__ CUtensorMap a_map,
                    const __grid_constant__ CUtensorMap b_map, const GemmArguments x) {
  using Shape = WideShape<kCluster>;
  constexpr bool kBlock = kScaling == Scaling::kBlock;
  constexpr bool kSs = (kVariant & 1) != 0;
  extern __shared__ __align__(1024) std::uint8_t shared[];
  const std::uint32_t stages = shared_address(shared);
  const std::uint32_t staging = stages + static_cast<std::uint32_t>(x.stages * Shape::kStageBytes);
  const std::uint32_t scales = staging + Shape::kStaging;
  Ring ring{scales + static_cast<std::uint32_t>(x.stages * Shape::kScaleBytes), x.stages};
  TileQueue queue{ring.barriers + static_cast<std::uint32_t>(16 * x.stages)};
  std::int32_t* lists =
      reinterpret_cast<std::int32_t*>(shared + (queue.at - stages) + TileQueue::kBytes);

  const int warp = warp_index(), lane = lane_index();
  if (threadIdx.x == 0) {
    tma_prefetch_map(&a_map);
    tma_prefetch_map(&b_map);
    for (int s = 0; s < x.stages; ++s) {
      mbarrier_init(ring.barriers + 8 * s, kBlock ? 33 : 1);  // TMA's, and the scales' 32 lanes
      mbarrier_init(ring.barriers + 8 * (x.stages + s), Shape::kConsumers * 4 * kCluster);
    }
    queue.init((Shape::kConsumers * 4 + (kBlock ? 2 : 1)) * kCluster);
    fence_barrier_init();
  }
  const RowTiles tiles =
      find_row_tiles<Shape::kTileRows>(lists, x.offsets, x.experts, x.M);  // synchronises
  if constexpr (kCluster > 1) cluster_sync();

  const int rank = kCluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int column_tiles = (x.N + Shape::kColumns - 1) / Shape::kColumns;
  const int total = tiles.first_tile[x.experts] * column_tiles;
  const int first = static_cast<int>(blockIdx.x) / kCluster;
  const int stride = static_cast<int>(gridDim.x) / kCluster;
  const int blocks = (x.K + 127) / 128;

  if (warp >= 4 * Shape::kConsumers) {
    give_registers<Shape::kProducerRegisters>();
    const int role = warp - 4 * Shape::kConsumers;
    WideTile tile;
    if (role == 0) {
      while (take_wide_tile(queue, lane, tile)) {
        const auto bytes = static_cast<std::uint32_t>(tile.slices * 8192 + Shape::kBBytes);
        for (int g = 0; g < blocks; ++g, ring.advance()) {
          mbarrier_wait(ring.empty(), ring.phase ^ 1);
          if (elect_one()) {
            mbarrier_arrive_expect(ring.full(), bytes);
            const std::uint32_t a =
                stages + static_cast<std::uint32_t>(ring.stage * Shape::kStageBytes);
            const std::uint32_t b = a + Shape::kABytes;
            for (int s = 0; s < tile.slices; ++s)
              tma_load_2d(a + 8192 * s, &a_map, ring.full(), 128 * g, tile.row + 64 * s);
            if constexpr (kCluster > 1) {
              constexpr int kShare = Shape::kColumns / kCluster;
              tma_load_3d_multicast(b + 128 * kShare * rank, &b_map, ring.full(),
                                    (1 << kCluster) - 1, 128 * g, tile.column + kShare * rank,
                                    tile.expert);
            } else {
              tma_load_3d(b, &b_map, ring.full(), 128 * g, tile.column, tile.expert);
            }
          }
          __syncwarp();
        }
      }
    }
    if (kBlock && role == 1) {
      while (take_wide_tile(queue, lane, tile))
        for (int g = 0; g < blocks; ++g, ring.advance()) {
          mbarrier_wait(ring.empty(), ring.phase ^ 1);
          ScaleStage<Shape::kRows>::copy(
              x, scales + static_cast<std::uint32_t>(ring.stage * Shape::kScaleBytes), g, tile.row,
              64 * tile.slices, tile.expert, tile.column, 2);
          copies_arrive(ring.full());
        }
    }
    if (role == 2 && rank == 0 && elect_one()) {
      for (int t = first; t < total; t = stride + atomicAdd(x.claimed, 1)) {
        put_wide_tile<kCluster>(
            queue, tile_at<Shape::kTileRows, Shape::kRowGroup>(tiles, column_tiles, t));
        queue.wait_taken();
      }
      for (int r = 0; r < kCluster; ++r) queue.put(r, make_int4(kNoTile, 0, 0, 0));
    }
  } else {
    take_registers<Shape::kConsumerRegisters>();
    const int group = warp / 4;
    const std::uint32_t warp_staging =
        staging + static_cast<std::uint32_t>(warp * Shape::kWarpStaging);
    // The lane's 16 bytes of this warp's rows for ldmatrix; 32 k of the contraction: ^ 32 k.
    const std::uint32_t fragment =
        static_cast<std::uint32_t>(128 * (16 * warp + lane % 16) + 16 * (lane / 16 ^ lane % 8));
    const std::uint32_t scale_row = static_cast<std::uint32_t>(4 * (16 * warp + lane / 4));
    float sum[Shape::kPieces][32], part[2][32];
#pragma unroll
    for (int i = 0; i < 32; ++i) part[0][i] = part[1][i] = 0.0f;

    if ((kVariant & 2) != 0 && group == 1) {
      const long long start = clock64();
      while (clock64() - start < 350) {
      }
    }
    for (WideTile tile; take_wide_tile(queue, lane, tile);) {
      if (group >= tile.slices) {
        for (int g = 0; g < blocks; ++g, ring.advance()) {
          mbarrier_wait(ring.full(), ring.phase);
          release_stage<kCluster>(ring.empty(), lane);
        }
        continue;
      }
      float s[2][2] = {};
#pragma unroll
      for (int p = 0; p < Shape::kPieces; ++p)
#pragma unroll
        for (int i = 0; i < 32; ++i) sum[p][i] = 0.0f;
#pragma unroll
      for (int i = 0; i < 32; ++i) part[1][i] = 0.0f;

      std::uint32_t a[4][4];
      const auto stage_address = [&] {
        return stages + static_cast<std::uint32_t>(ring.stage * Shape::kStageBytes);
      };
      const auto load_rows = [&] {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          load_matrix_x4(stage_address() + (fragment ^ static_cast<std::uint32_t>(32 * k)), a[k]);
      };
      // The first piece is in the tensor core and the last piece of the block before is promoted.
      const auto others = [&] {
        const std::uint32_t b = operand_low(stage_address() + Shape::kABytes);
        start_piece<kA, kB>(part[1], a, b + 512);
        if constexpr (kBlock) {
          const std::uint32_t scale =
              scales + static_cast<std::uint32_t>(ring.stage * Shape::kScaleBytes);
#pragma unroll
          for (int c = 0; c < 2; ++c)
#pragma unroll
            for (int h = 0; h < 2; ++h)
              s[c][h] = __fmul_rn(load_shared_float(scale + scale_row + 32 * h),
                                  load_shared_float(scale + 4 * (Shape::kRows + c)));
        }
        wgmma_wait<1>();
        promote_piece<kScaling>(part[0], s[0], sum[0]);
        start_piece<kA, kB>(part[0], a, b + 1024);
        wgmma_wait<1>();
        promote_piece<kScaling>(part[1], s[0], sum[1]);
        start_piece<kA, kB>(part[1], a, b + 1536);
        wgmma_wait<1>();
        promote_piece<kScaling>(part[0], s[1], sum[2]);
      };
      const auto first_piece = [&] {
        mbarrier_wait(ring.full(), ring.phase);
        load_rows();
        start_piece<kA, kB>(part[0], a, operand_low(stage_address() + Shape::kABytes));
        wgmma_wait<1>();  // says that part[1], waited for in the last round, is there
        promote_piece<kScaling>(part[1], s[1], sum[3]);
      };
      const auto end_round = [&] {
        wgmma_wait<0>();
        keep_registers(part[1]);
        release_stage<kCluster>(ring.empty(), lane);
        ring.advance();
      };
      const int step = kSs ? 2 : 1;
      if (kSs && blocks % 2 != 0) {
        first_piece();
        others();
        end_round();
      }
      for (int g = kSs ? blocks % 2 : 0; g < blocks; g += step) {
        first_piece();
        others();
        if constexpr (kSs) {
          const std::uint32_t before = ring.empty();
          ring.advance();
          mbarrier_wait(ring.full(), ring.phase);
          start_piece<kA, kB>(part[0], operand_low(stage_address()) + 512 * group,
                              operand_low(stage_address() + Shape::kABytes));
          wgmma_wait<1>();
          release_stage<kCluster>(before, lane);
          load_rows();
          promote_piece<kScaling>(part[1], s[1], sum[3]);
          others();
        }
        end_round();
      }
      promote_piece<kScaling>(part[1], s[1], sum[3]);

      const int row = tile.row + 16 * warp;
#pragma unroll
      for (int p = 0; p < Shape::kPieces; ++p) {
        const int column = tile.column + Shape::kPiece * p;
        if constexpr (!kBlock)
          scale_rows<Shape::kPiece>(x, tile.expert, row + lane / 4, column + 2 * (lane % 4),
                                    sum[p]);
        store_slice<Shape::kPiece, Shape::kPiece, (kVariant & 4) != 0>(x, sum[p], warp_staging, row, tile.end - row,
                                                  column);
      }
    }
  }
  if constexpr (kCluster > 1) cluster_sync();  // the other CTA may still arrive at our barriers
}

}  // namespace lockstep::ops::cuda

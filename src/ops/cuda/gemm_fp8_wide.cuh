// The FP8 GEMM for many rows an expert: D tiles of 128 rows and 256 columns.
//
// One warp loads blocks of 128 of the contraction into a ring (TMA, 128-byte swizzle), one the
// scales, one claims tiles; two warpgroups multiply 64 rows each. A warpgroup reads its rows of a
// block into registers once and multiplies them with 64 columns at a time, whose part lies in one
// of two accumulators: one is promoted into `sum` (docs/numerics.md, sections 4 and 6) while the
// other is in the tensor core. A tile of 64 rows or fewer is the first warpgroup's alone. Rows of
// the next expert may be loaded and multiplied; they are not stored.
#pragma once

#include "ops/cuda/gemm_fp8_common.cuh"
#include "ops/cuda/gemm_queue.cuh"
#include "ops/cuda/tickets.cuh"

namespace lockstep::ops::cuda {

struct WideShape {
  static constexpr int kConsumers = 2;
  static constexpr int kTileRows = 64 * kConsumers;
  static constexpr int kColumns = 256;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kABytes = kTileRows * 128;
  static constexpr int kBBytes = kColumns * 128;
  static constexpr int kStageBytes = kABytes + kBBytes;
  static constexpr int kScaleBytes = ScaleStage<kTileRows>::kBytes;
  static constexpr int kPiece = 64;  // columns of a part
  static constexpr int kPieces = kColumns / kPiece;
  static constexpr int kBoxRows = 16;                      // of a warp
  static constexpr int kBoxBytes = kBoxRows * kPiece * 2;  // BF16 results of a piece
  static constexpr int kWarpStaging = kPieces * kBoxBytes;
  static constexpr int kStaging = 4 * kConsumers * kWarpStaging;
  static constexpr int kQueueBytes = TileQueue::kBytes;
  static constexpr int kRowGroup = 2048 / kTileRows;  // row tiles that go together
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kProducerRegisters = 40;
};

struct WideTile {
  int expert, row, end, slices, column;
};
inline constexpr int kNoTile = -1;

__device__ __forceinline__ int4 packed(const RowTile& t) {
  return make_int4(4 * t.expert + t.slices, t.row, t.end, t.column * WideShape::kColumns);
}
// A whole warp; false: there are no more.
__device__ __forceinline__ bool take_tile(TileQueue& queue, WideTile& tile) {
  const int4 t = queue.take();
  // The same in all lanes, and known to be: the loops' addresses stay in uniform registers.
  const int which = __reduce_max_sync(0xFFFFFFFFu, t.x);
  tile = {which / 4, t.y, t.z, which % 4, t.w};
  return which != kNoTile;
}

// part = 64 rows of a block, in registers, times 64 columns; there after a wait.
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
// All pieces but the last started are there.
__device__ __forceinline__ void wait_piece(float (&part)[32]) {
  wgmma_wait<1>();
  keep_registers(part);
}

// Stores a warp's 16 rows. The copy engine takes whole boxes while the warp goes on; of a warp in
// which the expert ends, the lanes store the rows that are the expert's. Streaming: D is larger
// than the L2 cache, which is better used for operands.
__device__ __forceinline__ void store_wide_bf16(const GemmArguments& x, const CUtensorMap* map,
                                                const float (&sum)[4][32], std::uint32_t staging,
                                                int row, int rows_left, int column) {
  if (rows_left <= 0) return;
  const int lane = lane_index();  // read anew: addresses made from it are not kept meanwhile
  constexpr int kBoxBytes = WideShape::kBoxBytes;
  if (lane == 0) tma_store_wait_read<0>();
  __syncwarp();
  const int to_row = lane % 16;
#pragma unroll
  for (int p = 0; p < 4; ++p)
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const int part = (j + lane / 16) ^ (to_row % 8);  // the copy engine's swizzle
      const float* v = sum[p] + 4 * j;
      store_matrix_x4(
          staging + static_cast<std::uint32_t>(p * kBoxBytes + to_row * 128 + part * 16),
          pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
          pack_bf16(v[6], v[7]));
    }
  if (rows_left >= 16) {
    fence_async_shared();
    __syncwarp();
    if (lane == 0) {
      for (int p = 0; p < 4; ++p)
        if (column + 64 * p < x.N)
          tma_store_2d(map, staging + static_cast<std::uint32_t>(p * kBoxBytes), column + 64 * p,
                       row, L2Hint::kEvictFirst);
      tma_store_commit();
    }
    return;
  }
  __syncwarp();
  auto* out = static_cast<std::uint16_t*>(x.d) + static_cast<std::int64_t>(row) * x.N + column;
  const int n = 8 * lane;
  if (column + n < x.N)
#pragma unroll 1
    for (int r = 0; r < rows_left; ++r)
      __stcs(reinterpret_cast<uint4*>(out + static_cast<std::int64_t>(r) * x.N + n),
             load_shared_16(staging + static_cast<std::uint32_t>(lane / 8 * kBoxBytes + r * 128 +
                                                                 (lane % 8 ^ r % 8) * 16)));
}
__device__ __forceinline__ void store_wide_fp32(const GemmArguments& x, const float (&sum)[4][32],
                                                int row, int rows_left, int column) {
  const int lane = lane_index();
  auto* out = static_cast<float*>(x.d) + static_cast<std::int64_t>(row) * x.N + column;
#pragma unroll
  for (int j = 0; j < 32; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = lane / 4 + 8 * h, n = 8 * j + 2 * (lane % 4);
      const float* v = sum[j / 8] + 4 * (j % 8) + 2 * h;
      if (r < rows_left && column + n < x.N)
        *reinterpret_cast<float2*>(out + static_cast<std::int64_t>(r) * x.N + n) =
            make_float2(one_nan(v[0]), one_nan(v[1]));
    }
}

template <Fp8Type kA, Fp8Type kB, Scaling kScaling>
__global__ void __launch_bounds__(WideShape::kThreads, 1)
    fp8_wide_kernel(const __grid_constant__ CUtensorMap a_map,
                    const __grid_constant__ CUtensorMap b_map,
                    const __grid_constant__ CUtensorMap d_map, const GemmArguments x) {
  using Shape = WideShape;
  constexpr bool kBlock = kScaling == Scaling::kBlock;
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
    tma_prefetch_map(&d_map);
    for (int s = 0; s < x.stages; ++s) {
      mbarrier_init(ring.barriers + 8 * s, kBlock ? 33 : 1);  // TMA's, and the scales' 32 lanes
      mbarrier_init(ring.barriers + 8 * (x.stages + s), Shape::kConsumers * 4 * kReleases);
    }
    queue.init(4 * Shape::kConsumers + (kBlock ? 2 : 1));
    fence_barrier_init();
  }
  const RowTiles tiles =
      find_row_tiles<Shape::kTileRows>(lists, x.offsets, x.experts, x.M);  // synchronises

  const int blocks = (x.K + 127) / 128;
  const int role = warp - 4 * Shape::kConsumers;

  if (role >= 0) {
    give_registers<Shape::kProducerRegisters>();
    WideTile tile;
    if (role == 0) {
      while (take_tile(queue, tile)) {
        const auto bytes = static_cast<std::uint32_t>(tile.slices * 8192 + Shape::kBBytes);
        for (int g = 0; g < blocks; ++g, ring.advance()) {
          mbarrier_wait(ring.empty(), ring.phase ^ 1);
          if (elect_one()) {
            mbarrier_arrive_expect(ring.full(), bytes);
            const std::uint32_t a =
                stages + static_cast<std::uint32_t>(ring.stage * Shape::kStageBytes);
            for (int s = 0; s < tile.slices; ++s)
              tma_load_2d(a + 8192 * s, &a_map, ring.full(), 128 * g, tile.row + 64 * s);
            tma_load_3d(a + Shape::kABytes, &b_map, ring.full(), 128 * g, tile.column, tile.expert);
          }
          __syncwarp();
        }
      }
    } else if (role == 1 && kBlock) {
      while (take_tile(queue, tile))
        for (int g = 0; g < blocks; ++g, ring.advance()) {
          mbarrier_wait(ring.empty(), ring.phase ^ 1);
          ScaleStage<Shape::kTileRows>::copy(
              x, scales + static_cast<std::uint32_t>(ring.stage * Shape::kScaleBytes), g, tile.row,
              64 * tile.slices, tile.expert, tile.column, 2);
          copies_arrive(ring.full());
        }
    } else if (role == 2 && elect_one()) {
      const int column_tiles = (x.N + Shape::kColumns - 1) / Shape::kColumns;
      const int total = tiles.first_tile[x.experts] * column_tiles;
      int t = static_cast<int>(blockIdx.x);
      while (t < total) {
        queue.put(packed(tile_at<Shape::kTileRows, Shape::kRowGroup>(tiles, column_tiles, t)));
        queue.wait_taken();
        t = static_cast<int>(piece_of(next_ticket(x.tickets, static_cast<unsigned>(total))));
      }
      queue.put(make_int4(kNoTile, 0, 0, 0));
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
    for (int i = 0; i < 32; ++i) part[0][i] = 0.0f;

    for (WideTile tile; take_tile(queue, tile);) {
      if (group >= tile.slices) {
        for (int g = 0; g < blocks; ++g, ring.advance()) {
          mbarrier_wait(ring.full(), ring.phase);
          release_stage(ring.empty());
        }
        continue;
      }
      float s[2][2] = {};  // of two column blocks: rows, rows + 8
#pragma unroll
      for (int i = 0; i < 32; ++i)
        part[1][i] = sum[0][i] = sum[1][i] = sum[2][i] = sum[3][i] = 0.0f;

      for (int g = 0; g < blocks; ++g, ring.advance()) {
        mbarrier_wait(ring.full(), ring.phase);
        const std::uint32_t stage =
            stages + static_cast<std::uint32_t>(ring.stage * Shape::kStageBytes);
        const std::uint32_t b = operand_low(stage + Shape::kABytes);
        std::uint32_t a[4][4];
#pragma unroll
        for (int k = 0; k < 4; ++k)
          load_matrix_x4(stage + (fragment ^ static_cast<std::uint32_t>(32 * k)), a[k]);
        start_piece<kA, kB>(part[0], a, b);
        // The last piece of the block before. It is there; the compiler does not know that from the
        // wait of the last round.
        wait_piece(part[1]);
        promote<kScaling>(part[1], s[1], sum[3]);
        start_piece<kA, kB>(part[1], a, b + 512);
        if constexpr (kBlock) {
          const std::uint32_t scale =
              scales + static_cast<std::uint32_t>(ring.stage * Shape::kScaleBytes);
#pragma unroll
          for (int c = 0; c < 2; ++c)
#pragma unroll
            for (int h = 0; h < 2; ++h)
              s[c][h] = __fmul_rn(load_shared_float(scale + scale_row + 32 * h),
                                  load_shared_float(scale + 4 * (Shape::kTileRows + c)));
        }
        wait_piece(part[0]);
        promote<kScaling>(part[0], s[0], sum[0]);
        start_piece<kA, kB>(part[0], a, b + 1024);
        wait_piece(part[1]);
        promote<kScaling>(part[1], s[0], sum[1]);
        start_piece<kA, kB>(part[1], a, b + 1536);
        wait_piece(part[0]);
        promote<kScaling>(part[0], s[1], sum[2]);
        wgmma_wait<0>();
        keep_registers(part[1]);
        release_stage(ring.empty());
      }
      promote<kScaling>(part[1], s[1], sum[3]);

      const int row = tile.row + 16 * warp;
      if constexpr (!kBlock)
#pragma unroll
        for (int p = 0; p < Shape::kPieces; ++p) {
          const int l = lane_index();  // anew, as in the stores: one piece's addresses at a time
          scale_rows<Shape::kPiece>(x, tile.expert, row + l / 4,
                                    tile.column + Shape::kPiece * p + 2 * (l % 4), sum[p]);
          keep_registers(sum[p]);
        }
      if (x.bf16)
        store_wide_bf16(x, &d_map, sum, warp_staging, row, tile.end - row, tile.column);
      else
        store_wide_fp32(x, sum, row, tile.end - row, tile.column);
    }
    if (lane == 0) tma_store_wait_read<0>();  // before the CTA's shared memory is gone
  }
}

}  // namespace lockstep::ops::cuda

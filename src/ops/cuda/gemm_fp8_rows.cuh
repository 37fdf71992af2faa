// The FP8 GEMM for a middling number of rows: D tiles of 128 rows and 128 columns, so that small
// products have enough of them.
//
// One warp loads blocks of 128 of the contraction into a ring (TMA, 128-byte swizzle), one the
// scales; two warpgroups multiply 64 rows each, where the tile has that many. A block's part stays
// in the tensor core's accumulator for four steps and is then promoted into `sum`
// (docs/numerics.md, sections 4 and 6). Rows of the next expert may be loaded and multiplied; they
// are not stored.
#pragma once

#include "ops/cuda/gemm_fp8_common.cuh"

namespace lockstep::ops::cuda {

struct RowsShape {
  static constexpr int kConsumers = 2;
  static constexpr int kTileRows = 64 * kConsumers;
  static constexpr int kColumns = 128;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kABytes = kTileRows * 128;
  static constexpr int kBBytes = kColumns * 128;
  static constexpr int kStageBytes = kABytes + kBBytes;
  static constexpr int kScaleBytes = ScaleStage<kTileRows>::kBytes;
  static constexpr int kPiece = 64;                     // columns that are staged at a time
  static constexpr int kWarpStaging = 16 * kPiece * 2;  // BF16 results of a warp's 16 rows
  static constexpr int kStaging = 4 * kConsumers * kWarpStaging;
  static constexpr int kQueueBytes = 0;
  static constexpr int kRowGroup = 2048 / kTileRows;  // row tiles that go together
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
          if constexpr (kStream)
            __stcs(to, v);
          else
            *to = v;
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

template <Fp8Type kA, Fp8Type kB, Scaling kScaling>
__global__ void __launch_bounds__(RowsShape::kThreads, 1)
    fp8_rows_kernel(const __grid_constant__ CUtensorMap a_map,
                    const __grid_constant__ CUtensorMap b_map, const GemmArguments x) {
  using Shape = RowsShape;
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
      mbarrier_init(ring.barriers + 8 * (x.stages + s), Shape::kConsumers * 4 * kReleases);
    }
    fence_barrier_init();
  }
  const RowTiles tiles =
      find_row_tiles<Shape::kTileRows>(lists, x.offsets, x.experts, x.M);  // synchronises

  const int column_tiles = (x.N + Shape::kColumns - 1) / Shape::kColumns;
  const int total = tiles.first_tile[x.experts] * column_tiles;
  const int first = static_cast<int>(blockIdx.x), stride = static_cast<int>(gridDim.x);
  const int blocks = (x.K + 127) / 128;
  const auto tile_of = [&](int t) {
    return tile_at<Shape::kTileRows, Shape::kRowGroup>(tiles, column_tiles, t);
  };

  if (warp == 4 * Shape::kConsumers && elect_one()) {
    for (int t = first; t < total; t += stride) {
      const RowTile tile = tile_of(t);
      const auto bytes = static_cast<std::uint32_t>(tile.slices * 8192 + Shape::kBBytes);
      for (int g = 0; g < blocks; ++g, ring.advance()) {
        mbarrier_wait(ring.empty(), ring.phase ^ 1);
        mbarrier_arrive_expect(ring.full(), bytes);
        const std::uint32_t a =
            stages + static_cast<std::uint32_t>(ring.stage * Shape::kStageBytes);
        for (int s = 0; s < tile.slices; ++s)
          tma_load_2d(a + 8192 * s, &a_map, ring.full(), 128 * g, tile.row + 64 * s);
        tma_load_3d(a + Shape::kABytes, &b_map, ring.full(), 128 * g, tile.column * Shape::kColumns,
                    tile.expert);
      }
    }
  } else if (warp == 4 * Shape::kConsumers + 1 && kBlock) {
    for (int t = first; t < total; t += stride) {
      const RowTile tile = tile_of(t);
      for (int g = 0; g < blocks; ++g, ring.advance()) {
        mbarrier_wait(ring.empty(), ring.phase ^ 1);
        ScaleStage<Shape::kTileRows>::copy(
            x, scales + static_cast<std::uint32_t>(ring.stage * Shape::kScaleBytes), g, tile.row,
            64 * tile.slices, tile.expert, tile.column * Shape::kColumns, 1);
        copies_arrive(ring.full());
      }
    }
  } else if (warp < 4 * Shape::kConsumers) {
    const int group = warp / 4;
    const std::uint32_t warp_staging =
        staging + static_cast<std::uint32_t>(warp * Shape::kWarpStaging);
    const std::uint32_t first_stage = operand_low(stages);
    float sum[Shape::kColumns / 2], part[Shape::kColumns / 2];
#pragma unroll
    for (int i = 0; i < Shape::kColumns / 2; ++i) part[i] = 0.0f;

    for (int t = first; t < total; t += stride) {
      const RowTile tile = tile_of(t);
      const int column = tile.column * Shape::kColumns;
      const bool mine = group < tile.slices;
#pragma unroll
      for (int i = 0; i < Shape::kColumns / 2; ++i) sum[i] = 0.0f;

      for (int g = 0; g < blocks; ++g, ring.advance()) {
        mbarrier_wait(ring.full(), ring.phase);
        if (!mine) {
          release_stage(ring.empty());
          continue;
        }
        const std::uint32_t stage =
            first_stage + static_cast<std::uint32_t>(ring.stage * (Shape::kStageBytes / 16));
        start_block<kA, kB>(part, stage + 512 * group, stage + Shape::kABytes / 16);
        float s[2];
        if constexpr (kBlock) {
          const std::uint32_t at =
              scales + static_cast<std::uint32_t>(ring.stage * Shape::kScaleBytes);
#pragma unroll
          for (int h = 0; h < 2; ++h)
            s[h] = __fmul_rn(load_shared_float(at + 4 * (16 * warp + lane / 4 + 8 * h)),
                             load_shared_float(at + 4 * Shape::kTileRows));
        }
        finish_block(part);
        release_stage(ring.empty());
        promote<kScaling>(part, s, sum);
      }
      if (!mine) continue;
      const int row = tile.row + 16 * warp;
      if constexpr (!kBlock)
        scale_rows<Shape::kColumns>(x, tile.expert, row + lane / 4, column + 2 * (lane % 4), sum);
      store_slice<Shape::kColumns, Shape::kPiece>(x, sum, warp_staging, row, tile.end - row,
                                                  column);
    }
  }
}

}  // namespace lockstep::ops::cuda

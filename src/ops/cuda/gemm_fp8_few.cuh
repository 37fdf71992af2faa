// The FP8 GEMM for few rows an expert (decode): the weights are the 64-row operand, and the rows of
// A are the columns of the instruction, 8, 16, 32 or 64 as a tile has. Bound by the weights' bytes:
// a deep ring of 128 weights x 128 of the contraction is kept loading across tiles.
#pragma once

#include "ops/cuda/gemm_fp8_common.cuh"

namespace lockstep::ops::cuda {

struct FewShape {
  static constexpr int kConsumers = 2;
  static constexpr int kColumns = 64 * kConsumers;  // weights
  static constexpr int kTileRows = 64;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kWeightBytes = kColumns * 128;
  static constexpr int kStageBytes = kWeightBytes + kTileRows * 128;
  static constexpr int kScaleBytes = ScaleStage<kTileRows>::kBytes;
  static constexpr int kWarpStaging = kTileRows * 32;  // BF16 results: 16 weights of every row
  static constexpr int kStaging = 4 * kConsumers * kWarpStaging;
  static constexpr int kQueueBytes = 0;
  static constexpr int kRowGroup = 1 << 20;
};

// The instruction's columns for a tile of `rows` rows.
__device__ __forceinline__ int few_columns(int rows) {
  return rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : 64;
}

// d = weights x rows for one tile; thread t of the warpgroup holds weights (row of the fragment)
// and rows of A (columns of the fragment).
template <Fp8Type kA, Fp8Type kB, Scaling kScaling, int kRows>
__device__ __forceinline__ void few_tile(const GemmArguments& x, const RowTile& tile, Ring& ring,
                                         std::uint32_t stages, std::uint32_t scales,
                                         std::uint32_t staging) {
  constexpr bool kBlock = kScaling == Scaling::kBlock;
  constexpr int kPairs = kRows / 8;
  const int warp = warp_index(), lane = lane_index();
  const int blocks = (x.K + 127) / 128;
  float part[kRows / 2], sum[kRows / 2];
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) part[i] = sum[i] = 0.0f;

  for (int g = 0; g < blocks; ++g, ring.advance()) {
    mbarrier_wait(ring.full(), ring.phase);
    const std::uint32_t at =
        stages + static_cast<std::uint32_t>(ring.stage * FewShape::kStageBytes);
    start_block<kB, kA>(part, operand_low(at + 8192 * (warp / 4)),
                        operand_low(at + FewShape::kWeightBytes));
    float s[kPairs][2];
    if constexpr (kBlock) {
      const std::uint32_t scale =
          scales + static_cast<std::uint32_t>(ring.stage * FewShape::kScaleBytes);
      const float b_scale = load_shared_float(scale + 4 * FewShape::kTileRows);
#pragma unroll
      for (int j = 0; j < kPairs; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          s[j][c] = __fmul_rn(load_shared_float(scale + 4 * (8 * j + 2 * (lane % 4) + c)), b_scale);
    }
    finish_block(part);
    release_stage(ring.empty());
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) {
      if constexpr (kBlock)
        sum[i] = __fmaf_rn(part[i], s[i / 4][i % 2], sum[i]);
      else
        sum[i] = sum[i] + part[i];
    }
  }

  const int rows_left = tile.end - tile.row;
  const int warp_column = tile.column * FewShape::kColumns + 16 * warp;
  if constexpr (!kBlock) {
    float a[kPairs][2];
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int r = tile.row + 8 * j + 2 * (lane % 4) + c;
        a[j][c] = __ldg(x.a_scales + (r < x.M ? r : x.M - 1));
      }
    const float* b = x.b_scales + static_cast<std::int64_t>(tile.expert) * x.N;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int n = warp_column + lane / 4 + 8 * h;
      const float s = __ldg(b + (n < x.N ? n : x.N - 1));
#pragma unroll
      for (int j = 0; j < kPairs; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          sum[4 * j + 2 * h + c] = __fmul_rn(sum[4 * j + 2 * h + c], __fmul_rn(a[j][c], s));
    }
  }
  if (x.bf16) {
    // Staged as [row of A][16 weights].
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
      store_matrix_x2_transposed(
          staging + static_cast<std::uint32_t>((8 * j + lane % 8) * 32 + (lane / 8) % 2 * 16),
          pack_bf16(sum[4 * j], sum[4 * j + 1]), pack_bf16(sum[4 * j + 2], sum[4 * j + 3]));
    __syncwarp();
    auto* out = static_cast<std::uint16_t*>(x.d);
#pragma unroll
    for (int i = 0; i < (kRows * 2 + 31) / 32; ++i) {
      const int index = i * 32 + lane, r = index / 2, n = warp_column + index % 2 * 8;
      if (r < kRows && r < rows_left && n < x.N)
        *reinterpret_cast<uint4*>(out + static_cast<std::int64_t>(tile.row + r) * x.N + n) =
            load_shared_16(staging + static_cast<std::uint32_t>(index * 16));
    }
  } else {
    auto* out = static_cast<float*>(x.d);
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) {
      const int r = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      const int n = warp_column + lane / 4 + 8 * (i / 2 % 2);
      if (r < rows_left && n < x.N)
        out[static_cast<std::int64_t>(tile.row + r) * x.N + n] = one_nan(sum[i]);
    }
  }
}

template <Fp8Type kA, Fp8Type kB, Scaling kScaling>
__global__ void __launch_bounds__(FewShape::kThreads, 1)
    fp8_few_kernel(const __grid_constant__ CUtensorMap a_map,
                   const __grid_constant__ CUtensorMap b_map, const GemmArguments x) {
  extern __shared__ __align__(1024) std::uint8_t shared[];
  const std::uint32_t stages = shared_address(shared);
  const std::uint32_t staging =
      stages + static_cast<std::uint32_t>(x.stages * FewShape::kStageBytes);
  const std::uint32_t scales = staging + FewShape::kStaging;
  Ring ring{scales + static_cast<std::uint32_t>(x.stages * FewShape::kScaleBytes), x.stages};
  std::int32_t* lists =
      reinterpret_cast<std::int32_t*>(shared + (ring.barriers - stages) + 16 * x.stages);

  const int warp = warp_index();
  if (threadIdx.x == 0) {
    tma_prefetch_map(&a_map);
    tma_prefetch_map(&b_map);
    for (int s = 0; s < x.stages; ++s) {
      mbarrier_init(ring.barriers + 8 * s, kScaling == Scaling::kBlock ? 33 : 1);
      mbarrier_init(ring.barriers + 8 * (x.stages + s), FewShape::kConsumers * 4 * kReleases);
    }
    fence_barrier_init();
  }
  const RowTiles tiles =
      find_row_tiles<FewShape::kTileRows>(lists, x.offsets, x.experts, x.M);  // synchronises

  const int column_tiles = (x.N + FewShape::kColumns - 1) / FewShape::kColumns;
  const int total = tiles.first_tile[x.experts] * column_tiles;
  const int blocks = (x.K + 127) / 128;

  if (warp >= 4 * FewShape::kConsumers) {
    if (warp == 4 * FewShape::kConsumers && elect_one()) {
      for (int t = static_cast<int>(blockIdx.x); t < total; t += static_cast<int>(gridDim.x)) {
        const RowTile tile =
            tile_at<FewShape::kTileRows, FewShape::kRowGroup>(tiles, column_tiles, t);
        const int rows = few_columns(tile.end - tile.row);
        const std::uint32_t bytes = static_cast<std::uint32_t>(FewShape::kWeightBytes + rows * 128);
        for (int g = 0; g < blocks; ++g, ring.advance()) {
          mbarrier_wait(ring.empty(), ring.phase ^ 1);
          mbarrier_arrive_expect(ring.full(), bytes);
          const std::uint32_t at =
              stages + static_cast<std::uint32_t>(ring.stage * FewShape::kStageBytes);
          tma_load_3d(at, &b_map, ring.full(), 128 * g, tile.column * FewShape::kColumns,
                      tile.expert);
          for (int r = 0; r < rows; r += 8)
            tma_load_2d(at + FewShape::kWeightBytes + 128 * r, &a_map, ring.full(), 128 * g,
                        tile.row + r);
        }
      }
    }
    if (kScaling == Scaling::kBlock && warp == 4 * FewShape::kConsumers + 1) {
      for (int t = static_cast<int>(blockIdx.x); t < total; t += static_cast<int>(gridDim.x)) {
        const RowTile tile =
            tile_at<FewShape::kTileRows, FewShape::kRowGroup>(tiles, column_tiles, t);
        const int rows = tile.end - tile.row <= 32 ? 32 : 64;
        for (int g = 0; g < blocks; ++g, ring.advance()) {
          mbarrier_wait(ring.empty(), ring.phase ^ 1);
          ScaleStage<FewShape::kTileRows>::copy(
              x, scales + static_cast<std::uint32_t>(ring.stage * FewShape::kScaleBytes), g,
              tile.row, rows, tile.expert, tile.column * FewShape::kColumns, 1);
          copies_arrive(ring.full());
        }
      }
    }
    return;
  }
  const std::uint32_t warp_staging =
      staging + static_cast<std::uint32_t>(warp * FewShape::kWarpStaging);
  for (int t = static_cast<int>(blockIdx.x); t < total; t += static_cast<int>(gridDim.x)) {
    const RowTile tile = tile_at<FewShape::kTileRows, FewShape::kRowGroup>(tiles, column_tiles, t);
    switch (few_columns(tile.end - tile.row)) {
      case 8:
        few_tile<kA, kB, kScaling, 8>(x, tile, ring, stages, scales, warp_staging);
        break;
      case 16:
        few_tile<kA, kB, kScaling, 16>(x, tile, ring, stages, scales, warp_staging);
        break;
      case 32:
        few_tile<kA, kB, kScaling, 32>(x, tile, ring, stages, scales, warp_staging);
        break;
      default:
        few_tile<kA, kB, kScaling, 64>(x, tile, ring, stages, scales, warp_staging);
    }
  }
}

}  // namespace lockstep::ops::cuda

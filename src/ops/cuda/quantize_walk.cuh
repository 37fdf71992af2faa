// Which tiles of 128 x 128 the quantizer's kernel works on, and in which order its CTAs meet them.
#pragma once

#include "ops/cuda/quantize_block.cuh"

namespace lockstep::ops::cuda {

inline constexpr int kTileThreads = 256;

enum class Pass {
  kBlocks,   // scales of 128 and codes, from one read
  kLargest,  // only the largest magnitudes, into row_largest and column_largest
  kEncode,   // codes under the scales that row_scales and column_scales hold
};

// The tensor and what is wanted of it. Outputs that are null are left out.
struct TilePlan {
  std::int64_t M = 0, K = 0;  // K: columns of one part of the source
  // Which rows a tile holds: those of the segments, in their padded order; without offsets,
  // segments of segment_rows rows each, whose columns follow each other without padding.
  const std::int32_t* offsets = nullptr;
  const std::int32_t* padded = nullptr;
  std::int64_t experts = 1, segment_rows = 0;
  std::int64_t row_tiles = 0;  // an upper bound where there are segments
  bool pow2 = false;

  Fp8* row_codes = nullptr;
  float* row_scales = nullptr;
  Fp8* column_codes = nullptr;
  float* column_scales = nullptr;
  std::int64_t column_stride = 0;
  std::uint32_t* row_largest = nullptr;
  std::uint32_t* column_largest = nullptr;
  QuantStats* stats = nullptr;  // of the row codes, or else of the column codes
};

struct Tile {
  std::int64_t row0;          // in the source
  std::int64_t column0;       // in a part of the source
  std::int64_t column_base;   // of the tile's first token in column_codes
  std::int64_t column_scale;  // row of column_scales
  int rows;                   // of the source, from row0 on
  int columns;
  int room;  // tokens that a column has in the output; those behind `rows` get zeros
};

// A CTA's way through the tiles: row tile by row tile, in steps of the grid, without divisions.
struct Walk {
  unsigned row, column;            // the next tile
  unsigned row_step, column_step;  // of the grid
  unsigned row_tiles, column_tiles;
  unsigned expert = 0, expert_tile = 0;  // the segment, and its first row tile where they are equal
};

__device__ inline Walk start_walk(const TilePlan& plan) {
  const auto column_tiles = static_cast<unsigned>((plan.K + kQuantBlock - 1) / kQuantBlock);
  const auto row_tiles = static_cast<unsigned>(
      plan.offsets == nullptr ? plan.row_tiles : __ldg(plan.padded + plan.experts) / kQuantBlock);
  return {blockIdx.x / column_tiles,
          blockIdx.x % column_tiles,
          gridDim.x / column_tiles,
          gridDim.x % column_tiles,
          row_tiles,
          column_tiles};
}

// The next tile; false where there is none.
template <Pass kPass>
__device__ inline bool next_tile(const TilePlan& plan, Walk& walk, Tile& tile) {
  if (walk.row >= walk.row_tiles) return false;
  const std::int64_t at = std::int64_t{walk.row} * kQuantBlock;
  tile.column0 = std::int64_t{walk.column} * kQuantBlock;
  tile.columns = static_cast<int>(min(std::int64_t{kQuantBlock}, plan.K - tile.column0));
  if (plan.offsets == nullptr) {
    const auto per_segment =
        static_cast<unsigned>((plan.segment_rows + kQuantBlock - 1) / kQuantBlock);
    for (; walk.row - walk.expert_tile >= per_segment; walk.expert_tile += per_segment)
      ++walk.expert;
    const std::int64_t begin = std::int64_t{walk.row - walk.expert_tile} * kQuantBlock;
    tile.row0 = walk.expert * plan.segment_rows + begin;
    tile.rows = tile.room =
        static_cast<int>(min(std::int64_t{kQuantBlock}, plan.segment_rows - begin));
    tile.column_base = walk.expert * plan.K * plan.segment_rows + begin;
    tile.column_scale = walk.expert;
  } else {
    while (__ldg(plan.padded + walk.expert + 1) <= at) ++walk.expert;
    const std::int32_t first = __ldg(plan.offsets + walk.expert);
    const std::int64_t begin = at - __ldg(plan.padded + walk.expert);
    const std::int64_t left = __ldg(plan.offsets + walk.expert + 1) - first - begin;
    tile.row0 = first + begin;
    tile.rows = static_cast<int>(max(std::int64_t{0}, min(std::int64_t{kQuantBlock}, left)));
    tile.room = kQuantBlock;
    tile.column_base = at;
    tile.column_scale = kPass == Pass::kBlocks ? walk.row : walk.expert;
  }
  walk.row += walk.row_step;
  walk.column += walk.column_step;
  if (walk.column >= walk.column_tiles) {
    walk.column -= walk.column_tiles;
    ++walk.row;
  }
  return true;
}

}  // namespace lockstep::ops::cuda

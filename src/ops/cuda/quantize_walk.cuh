// Which tiles of 128 x 128 the quantizer's kernel works on, and in which order its CTAs meet them.
#pragma once

#include "ops/cuda/quantize_block.cuh"
#include "ops/cuda/tickets.cuh"

namespace lockstep::ops::cuda {

inline constexpr int kTileThreads = 256;

enum class Pass {
  kBlocks,   // scales of 128 and codes, from one read
  kLargest,  // only the largest magnitudes, into row_largest and column_largest
  kEncode,   // scales of the largest magnitudes, and codes; without those, the scales are there
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
  unsigned* tickets = nullptr;  // ops/cuda/tickets.cuh
};

struct Tile {
  std::int64_t column_base;  // of the tile's first token in column_codes
  int row0;                  // in the source
  int column0;               // in a part of the source
  int column_scale;          // row of column_scales
  int rows;                  // of the source, from row0 on
  int columns;
  int room;    // tokens that a column has in the output; those behind `rows` get zeros
  bool first;  // of the segment's row tiles
};

// The tiles of a CTA, which thread 0 finds, in the order of the tensor: row tile by row tile. The
// others wait for it, so it has no time for memory or a division: the segments' ends are here where
// there is room.
struct TileWalk {
  static constexpr int kSegments = 128;
  unsigned tiles, column_tiles, reciprocal;  // of the tensor; 2^32 / column_tiles, rounded up
  int expert, expert_tile;                   // the last tile's segment, its first row tile
  const std::int32_t *offsets, *padded;      // of the segments
  Tile found[4];                             // number i of the CTA at i % 4; rows < 0: none
  std::int32_t ends[2][kSegments + 1];       // copies of offsets and padded
};

// Every thread of the CTA calls it.
__device__ inline void start_walk(const TilePlan& plan, TileWalk& walk) {
  const bool room = plan.offsets != nullptr && plan.experts <= TileWalk::kSegments;
  const int thread = static_cast<int>(threadIdx.x);
  if (room && thread <= plan.experts) {
    walk.ends[0][thread] = __ldg(plan.offsets + thread);
    walk.ends[1][thread] = __ldg(plan.padded + thread);
  }
  if (thread == 0) {
    walk.column_tiles = static_cast<unsigned>((plan.K + kQuantBlock - 1) / kQuantBlock);
    walk.reciprocal = 0xFFFFFFFFu / walk.column_tiles + 1;
    const auto row_tiles = static_cast<unsigned>(
        plan.offsets == nullptr ? plan.row_tiles : __ldg(plan.padded + plan.experts) / kQuantBlock);
    walk.tiles = row_tiles * walk.column_tiles;
    walk.expert = walk.expert_tile = 0;
    walk.offsets = room ? walk.ends[0] : plan.offsets;
    walk.padded = room ? walk.ends[1] : plan.padded;
  }
  __syncthreads();
}

// Finds the CTA's tile `number` by its ticket, which becomes that of the next one.
template <Pass kPass>
__device__ inline void find_tile(const TilePlan& plan, TileWalk& walk, unsigned number,
                                 unsigned& ticket) {
  Tile& tile = walk.found[number % 4];
  const unsigned piece = piece_of(ticket);
  if (piece >= walk.tiles) {
    tile = {};
    tile.rows = -1;
    return;
  }
  // A reciprocal of 0 is 2^32 / 1; of other ones the product may be one too large.
  unsigned row_tile = walk.reciprocal == 0 ? piece : __umulhi(piece, walk.reciprocal);
  if (row_tile * walk.column_tiles > piece) --row_tile;
  const auto row = static_cast<int>(row_tile);
  tile.column0 = static_cast<int>(piece - row_tile * walk.column_tiles) * kQuantBlock;
  tile.columns = min(kQuantBlock, static_cast<int>(plan.K) - tile.column0);
  int expert = walk.expert;
  if (plan.offsets == nullptr) {
    const auto segment_rows = static_cast<int>(plan.segment_rows);
    const int per_segment = (segment_rows + kQuantBlock - 1) / kQuantBlock;
    for (; row - walk.expert_tile >= per_segment; walk.expert_tile += per_segment) ++expert;
    const int begin = (row - walk.expert_tile) * kQuantBlock;
    tile.row0 = expert * segment_rows + begin;
    tile.rows = tile.room = min(kQuantBlock, segment_rows - begin);
    tile.column_base = expert * plan.K * plan.segment_rows + begin;
    tile.column_scale = expert;
    tile.first = begin == 0;
  } else {
    const int at = row * kQuantBlock;
    while (walk.padded[expert + 1] <= at) ++expert;
    const int first = walk.offsets[expert], begin = at - walk.padded[expert];
    tile.row0 = first + begin;
    tile.rows = max(0, min(kQuantBlock, walk.offsets[expert + 1] - first - begin));
    tile.room = kQuantBlock;
    tile.column_base = at;
    tile.column_scale = kPass == Pass::kBlocks ? row : expert;
    tile.first = begin == 0;
  }
  walk.expert = expert;
  ticket = next_ticket(plan.tickets, walk.tiles);
}

}  // namespace lockstep::ops::cuda

// The scales of a tile of 128 x 128: of its rows and of its columns, from its own values or from
// largest magnitudes that were found before.
#pragma once

#include "ops/cuda/quantize_fetch.cuh"
#include "ops/cuda/quantize_stats.cuh"

namespace lockstep::ops::cuda {

struct TileMemory {
  union {
    std::uint32_t largest[kTileThreads / 32][kQuantBlock];  // of each warp's rows, by column
    // Column c's tokens in pieces of eight; piece i lies at place i ^ (c / 8), so that neither the
    // writes (a warp: 16 columns, eight apart) nor the reads (a column) meet in a bank.
    alignas(16) std::uint8_t codes[kQuantBlock][kQuantBlock];
  };
  alignas(16) float inverse[2 * kQuantBlock];  // of up to two parts
  TileWalk walk;
};

// The row of the tile whose scale this lane works out.
__device__ inline int tile_row() {
  return static_cast<int>(threadIdx.x) / 16 * 8 + static_cast<int>(threadIdx.x) % 16 / 2;
}

// Where scales come before the codes (kEncode): what this thread has read for them of a tile, for
// its lane's row and for a column, as bits of a largest magnitude or of a scale.
struct KnownBits {
  std::uint32_t row, column;
};
template <int kParts>
__device__ inline std::int64_t known_column(const TilePlan& plan, const Tile& tile) {
  const int thread = static_cast<int>(threadIdx.x);
  return (std::int64_t{tile.column_scale} * kParts + thread / kQuantBlock) * plan.K + tile.column0 +
         thread % kQuantBlock;
}
template <int kParts>
__device__ inline bool knows_column(const TilePlan& plan, const Tile& tile) {
  const int thread = static_cast<int>(threadIdx.x);
  return plan.column_codes != nullptr && thread < kParts * kQuantBlock &&
         thread % kQuantBlock < tile.columns;
}
template <int kParts>
__device__ inline KnownBits read_known(const TilePlan& plan, const Tile& tile) {
  KnownBits bits{};
  const auto* rows = plan.row_largest != nullptr
                         ? plan.row_largest
                         : reinterpret_cast<const std::uint32_t*>(plan.row_scales);
  const auto* columns = plan.column_largest != nullptr
                            ? plan.column_largest
                            : reinterpret_cast<const std::uint32_t*>(plan.column_scales);
  if (plan.row_codes != nullptr && tile_row() < tile.rows)
    bits.row = __ldg(rows + tile.row0 + tile_row());
  if (knows_column<kParts>(plan, tile))
    bits.column = __ldg(columns + known_column<kParts>(plan, tile));
  return bits;
}

// Puts 1 / s of the columns into `inverse`, behind a barrier that has to follow, and returns that
// of the lane's row. Scales and counters that belong to several tiles are written by the first one.
template <int kParts>
__device__ inline float known_scales(const TilePlan& plan, const Tile& tile, const KnownBits& bits,
                                     TileMemory& memory, ThreadStats& stats) {
  if (knows_column<kParts>(plan, tile)) {
    float s = numerics::bits_float(bits.column);
    if (plan.column_largest != nullptr) {
      s = scale_of(bits.column, plan.pow2);
      if (tile.first) {
        plan.column_scales[known_column<kParts>(plan, tile)] = s;
        if (plan.stats != nullptr && plan.row_codes == nullptr && tile.rows > 0)
          stats.count_block(bits.column);
      }
    }
    memory.inverse[threadIdx.x] = 1.0f / s;
  }
  if (plan.row_codes == nullptr || tile_row() >= tile.rows) return 1.0f;
  float s = numerics::bits_float(bits.row);
  if (plan.row_largest != nullptr) {
    s = scale_of(bits.row, plan.pow2);
    if (threadIdx.x % 2 == 0 && tile.column0 == 0) {
      plan.row_scales[tile.row0 + tile_row()] = s;
      if (plan.stats != nullptr) stats.count_block(bits.row);
    }
  }
  return 1.0f / s;
}

// Finds the largest magnitudes of the tile's rows, one for two lanes, and their scales where a
// scale covers only the tile's columns. Returns 1 / s of the lane's row. column0: of the outputs.
template <Pass kPass, typename Values>
__device__ inline float tile_row_scales(const TilePlan& plan, const Tile& tile,
                                        const Values (&x)[8], std::int64_t column0,
                                        ThreadStats& stats) {
  const std::uint32_t amax = row_largest(x);
  const bool owner = threadIdx.x % 2 == 0 && tile_row() < tile.rows;
  const int row = tile.row0 + tile_row();
  if constexpr (kPass == Pass::kLargest) {
    if (owner) atomicMax(plan.row_largest + row, amax);
    return 1.0f;
  } else {
    const float s = scale_of(amax, plan.pow2);
    if (owner) {
      plan.row_scales[column0 / kQuantBlock * plan.M + row] = s;
      if (plan.stats != nullptr) stats.count_block(amax);
    }
    return 1.0f / s;
  }
}

// Finds the largest magnitudes of the tile's columns, one a thread, and their scales where a scale
// covers only the tile; a barrier has to follow, behind which `inverse` holds what the codes need.
template <Pass kPass, typename Values>
__device__ inline void tile_column_scales(const TilePlan& plan, const Tile& tile,
                                          const Values (&x)[8], std::int64_t column0, int columns,
                                          std::int64_t width, TileMemory& memory,
                                          ThreadStats& stats) {
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();  // the codes before have been read
  store_column_largest(x, memory.largest[thread / 32]);
  __syncthreads();
  if (thread >= columns) return;
  const std::int64_t at = tile.column_scale * width + column0 + thread;
  std::uint32_t amax = 0;
#pragma unroll
  for (int w = 0; w < kTileThreads / 32; ++w)
    amax = max(amax, load_column_largest<Values>(memory.largest[w], thread));
  if constexpr (kPass == Pass::kLargest) {
    atomicMax(plan.column_largest + at, amax);
  } else {
    const float s = scale_of(amax, plan.pow2);
    plan.column_scales[at] = s;
    memory.inverse[thread] = 1.0f / s;
    if (plan.stats != nullptr && plan.row_codes == nullptr && tile.rows > 0)
      stats.count_block(amax);
  }
}

// Segments without rows have no tiles, but scales where one covers a whole column.
__device__ inline void scales_of_empty_segments(const TilePlan& plan, std::int64_t width) {
  for (std::int64_t e = blockIdx.x; e < plan.experts; e += gridDim.x) {
    if (__ldg(plan.offsets + e) != __ldg(plan.offsets + e + 1)) continue;
    for (std::int64_t column = threadIdx.x; column < width; column += kTileThreads)
      plan.column_scales[e * width + column] = scale_of(0, plan.pow2);
  }
}

}  // namespace lockstep::ops::cuda

// How a grouped GEMM is cut into tiles on the device: experts' row counts are only known there. A
// tile never crosses an expert; a CTA takes tiles first, first + stride, ... or claims them.
#pragma once

#include <cstdint>

namespace lockstep::ops::cuda {

// Row tiles of every expert, in shared memory: 2 * (experts + 1) numbers.
struct RowTiles {
  std::int32_t* first_row;   // [E + 1]
  std::int32_t* first_tile;  // [E + 1]: row tiles before the expert; the last is the total
  int experts;

  static constexpr int bytes(int experts) {
    return 2 * (experts + 1) * static_cast<int>(sizeof(std::int32_t));
  }
};

// All threads of a CTA call it; ends with __syncthreads. offsets null: one expert of `rows` rows.
template <int kTileRows>
__device__ inline RowTiles find_row_tiles(std::int32_t* shared, const std::int32_t* offsets,
                                          int experts, int rows) {
  const RowTiles tiles{shared, shared + experts + 1, experts};
  for (int e = static_cast<int>(threadIdx.x); e <= experts; e += static_cast<int>(blockDim.x))
    tiles.first_row[e] = offsets != nullptr ? offsets[e] : e * rows;
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = static_cast<int>(threadIdx.x);
    int before = 0;
    for (int chunk = 0; chunk < experts; chunk += 32) {
      const int e = chunk + lane;
      const int mine =
          e < experts ? (tiles.first_row[e + 1] - tiles.first_row[e] + kTileRows - 1) / kTileRows
                      : 0;
      int sum = mine;
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(0xFFFFFFFFu, sum, d);
        if (lane >= d) sum += other;
      }
      if (e < experts) tiles.first_tile[e] = before + sum - mine;
      before += __shfl_sync(0xFFFFFFFFu, sum, 31);
    }
    if (lane == 0) tiles.first_tile[experts] = before;
  }
  __syncthreads();
  return tiles;
}

struct RowTile {
  int expert;
  int row;     // of the whole matrix
  int end;     // the expert's last row + 1
  int slices;  // 64 rows each (or fewer in the last): 1 .. kTileRows / 64
  int column;  // index of the column tile
};

// Tile `index` of tiles.first_tile[E] * column_tiles. An expert's tiles lie together; in it, groups
// of kGroup row tiles share their columns' operand while it is in the L2 cache. Only the
// last row tile of an expert may have fewer slices.
template <int kTileRows, int kGroup>
__device__ inline RowTile tile_at(const RowTiles& tiles, int column_tiles, int index) {
  const int row_tile = index / column_tiles;
  int low = 0, high = tiles.experts;  // first_tile[low] <= row_tile < first_tile[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (tiles.first_tile[middle] <= row_tile)
      low = middle;
    else
      high = middle;
  }
  const int first = tiles.first_tile[low], count = tiles.first_tile[low + 1] - first;
  const int local = index - first * column_tiles;
  const int group = local / (kGroup * column_tiles) * kGroup;
  const int in_group = local - group * column_tiles;
  const int width = count - group < kGroup ? count - group : kGroup;
  const int column = in_group / width, i = group + in_group - column * width;

  RowTile tile;
  tile.expert = low;
  tile.end = tiles.first_row[low + 1];
  tile.column = column;
  tile.row = tiles.first_row[low] + kTileRows * i;
  const int slices = (tile.end - tile.row + 63) / 64;
  tile.slices = slices < kTileRows / 64 ? slices : kTileRows / 64;
  return tile;
}

// A ring of buffers in shared memory with a barrier each for "full" and "empty".
struct Ring {
  std::uint32_t barriers;  // [2 * stages] of 8 bytes: full, then empty
  int stages;
  int stage = 0;
  std::uint32_t phase = 0;

  __device__ std::uint32_t full() const { return barriers + 8 * static_cast<std::uint32_t>(stage); }
  __device__ std::uint32_t empty() const {
    return barriers + 8 * static_cast<std::uint32_t>(stages + stage);
  }
  __device__ void advance() {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace lockstep::ops::cuda

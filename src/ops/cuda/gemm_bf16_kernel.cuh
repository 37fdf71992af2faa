// The BF16 product on the tensor cores: a persistent kernel, one warp that loads with the copy
// engine into a ring of stages, two warpgroups that multiply. One chain over all of K (docs/
// numerics.md, section 4), so the tile has no influence on the bits.
//
// A tile has kRows rows and kColumns columns of wgmma's D. Plain: rows are rows of a, columns are
// columns of d. Swapped (kSwap), for few rows: rows are columns of d, columns are rows of a.
#pragma once

#include "ops/cuda/gemm_ring.cuh"
#include "ops/cuda/gemm_store.cuh"
#include "ops/cuda/ptx.cuh"
#include "ops/cuda/wgmma.cuh"

namespace lockstep::ops::cuda {

struct Bf16Product {
  const std::int32_t* offsets_E1;  // device; null: one group of M rows
  void* d_MN;
  int groups, M, N, K;
};

template <int kColumnsOfTile, bool kSwapOperands, bool kWeightsMnMajor>
struct Bf16Tile {
  static constexpr int kRows = 128, kColumns = kColumnsOfTile;
  static constexpr bool kSwap = kSwapOperands;
  static constexpr int kBlockRows = kSwap ? kColumns : kRows;     // rows of a in a tile
  static constexpr int kBlockColumns = kSwap ? kRows : kColumns;  // columns of d in a tile
  static constexpr Major kWeights = kWeightsMnMajor ? Major::kMn : Major::kK;
  static constexpr Major kMajorRows = kSwap ? kWeights : Major::kK;
  static constexpr Major kMajorColumns = kSwap ? Major::kK : kWeights;
  static constexpr int kDepth = 64;  // of the contraction, a stage: 128 bytes
  static constexpr int kRowBytes = kRows * 128, kColumnBytes = kColumns * 128;
  static constexpr int kStageBytes = kRowBytes + kColumnBytes;
  static constexpr int kStages = 192 * 1024 / kStageBytes < 10 ? 192 * 1024 / kStageBytes : 10;
  static constexpr int kBoxes = 2;  // for results, of each warpgroup
  static constexpr int kBoxBytes = kBoxes * kStoreBoxBytes;
  static constexpr int kSharedBytes =
      kStages * kStageBytes + kRingSlack + (kSwap ? 0 : 2 * kBoxBytes);
  static constexpr int kThreads = 384;
};

// Tiles of all groups, in an order in which the tiles at work at one time share rows and columns:
// kBand row tiles, all their columns, the next band.
struct Bf16Place {
  int group, first_row, rows, row, column;  // row counts from first_row
};
class Bf16Walk {
 public:
  // Called by whole warps. False: no more tiles.
  template <typename Tile>
  __device__ bool locate(const Bf16Product& x, int tile, Bf16Place& place) {
    constexpr int kBand = Tile::kSwap ? 1 : 2048 / Tile::kRows;
    const int column_tiles = (x.N + Tile::kBlockColumns - 1) / Tile::kBlockColumns;
    if (x.offsets_E1 == nullptr) {
      place.group = 0;
      place.first_row = 0;
      place.rows = x.M;
    } else if (!find_group<Tile::kBlockRows>(x, tile, column_tiles, place)) {
      return false;
    }
    const int row_tiles = (place.rows + Tile::kBlockRows - 1) / Tile::kBlockRows;
    const int local = tile - before_;
    if (local >= row_tiles * column_tiles) return false;
    const int band = local / (kBand * column_tiles);
    const int height = min(kBand, row_tiles - band * kBand);
    const int rest = local - band * kBand * column_tiles;
    place.row = (band * kBand + rest % height) * Tile::kBlockRows;
    place.column = rest / height * Tile::kBlockColumns;
    return true;
  }

 private:
  // The group of a tile, 32 groups at a time; tiles come in ascending order.
  template <int kBlockRows>
  __device__ bool find_group(const Bf16Product& x, int tile, int column_tiles, Bf16Place& place) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (; group_ < x.groups;) {
      const int g = group_ + lane;
      const int first = g < x.groups ? x.offsets_E1[g] : 0;
      const int rows = g < x.groups ? x.offsets_E1[g + 1] - first : 0;
      const int tiles = (rows + kBlockRows - 1) / kBlockRows * column_tiles;
      int sum = tiles;  // of this lane and those below
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(0xFFFFFFFFu, sum, d);
        if (lane >= d) sum += other;
      }
      const unsigned behind = __ballot_sync(0xFFFFFFFFu, before_ + sum > tile);
      if (behind != 0) {
        const int source = __ffs(static_cast<int>(behind)) - 1;
        group_ += source;
        before_ += __shfl_sync(0xFFFFFFFFu, sum - tiles, source);
        place.group = group_;
        place.first_row = __shfl_sync(0xFFFFFFFFu, first, source);
        place.rows = __shfl_sync(0xFFFFFFFFu, rows, source);
        return true;
      }
      before_ += __shfl_sync(0xFFFFFFFFu, sum, 31);
      group_ += 32;
    }
    return false;
  }
  int group_ = 0, before_ = 0;
};

// One stage's boxes of an operand: K-major [kExtent, 64 of k], or MN-major in slabs of 64 columns,
// [64 of k, 64] each.
template <Major kMajor, int kExtent>
__device__ void load_weights(std::uint32_t to, const CUtensorMap* map, std::uint32_t barrier, int k,
                             int column, int group) {
  if constexpr (kMajor == Major::kK) {
    tma_load_3d(to, map, barrier, k, column, group);
  } else {
#pragma unroll
    for (int slab = 0; slab < kExtent / 64; ++slab)
      tma_load_3d(to + slab * 8192, map, barrier, column + slab * 64, k, group);
  }
}

// Descriptor of 16 k at step `step` of an operand in shared memory, from its slab or row `extent`.
template <Major kMajor>
__device__ std::uint64_t bf16_operand(std::uint32_t address, int extent, int step) {
  if constexpr (kMajor == Major::kK)
    return operand_128b(address + extent * 128 + step * 32);
  else
    return operand_128b(address + extent / 64 * 8192 + step * 2048, 1024, 8192);
}

// Straight from registers: for swapped tiles, and where an expert ends inside the tile.
template <typename Tile, typename Output>
__device__ void write_bf16_tile(const Bf16Product& x, const Bf16Place& place,
                                const float (&acc)[Tile::kColumns / 2]) {
  const int thread = static_cast<int>(threadIdx.x) % 256, lane = thread % 32;
  Output* d = static_cast<Output*>(x.d_MN);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = thread / 32 * 16 + lane / 4 + 8 * h;  // of wgmma's D
#pragma unroll
    for (int j = 0; j < Tile::kColumns / 8; ++j) {
      const int column = 8 * j + 2 * (lane % 4);
      const float low = acc[4 * j + 2 * h], high = acc[4 * j + 2 * h + 1];
      if constexpr (!Tile::kSwap) {
        const int m = place.row + row, n = place.column + column;
        if (m < place.rows && n < x.N)
          store_pair(d + static_cast<std::int64_t>(place.first_row + m) * x.N + n, low, high);
      } else {
        const int m = place.row + column, n = place.column + row;
        Output* at = d + static_cast<std::int64_t>(place.first_row + m) * x.N + n;
        if (m < place.rows && n < x.N) store_one(at, low);
        if (m + 1 < place.rows && n < x.N) store_one(at + x.N, high);
      }
    }
  }
}

template <typename Tile, typename Output>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    bf16_gemm_kernel(const __grid_constant__ CUtensorMap a_map,
                     const __grid_constant__ CUtensorMap b_map,
                     const __grid_constant__ CUtensorMap d_map, const Bf16Product x) {
  extern __shared__ unsigned char shared[];
  const StageRing<Tile::kStages, Tile::kStageBytes> ring(shared);
  ring.init(8);
  const int warpgroup = warpgroup_index();
  const int depth_tiles = (x.K + Tile::kDepth - 1) / Tile::kDepth;
  Bf16Walk walk;
  Bf16Place place{};
  RingPosition<Tile::kStages> at;

  if (warpgroup == 2) {
    give_registers<40>();
    if (threadIdx.x / 32 != 8) return;
    const bool leader = elect_one();
    for (int tile = static_cast<int>(blockIdx.x); walk.locate<Tile>(x, tile, place);
         tile += static_cast<int>(gridDim.x)) {
      for (int t = 0; t < depth_tiles; ++t, at.advance()) {
        if (!leader) continue;
        const std::uint32_t barrier = ring.start_fill(at, Tile::kStageBytes);
        const std::uint32_t rows = ring.stage(at), columns = rows + Tile::kRowBytes;
        tma_load_2d(Tile::kSwap ? columns : rows, &a_map, barrier, t * Tile::kDepth,
                    place.first_row + place.row);
        load_weights<Tile::kWeights, Tile::kBlockColumns>(Tile::kSwap ? rows : columns, &b_map,
                                                          barrier, t * Tile::kDepth, place.column,
                                                          place.group);
      }
    }
    return;
  }

  take_registers<232>();
  for (int tile = static_cast<int>(blockIdx.x); walk.locate<Tile>(x, tile, place);
       tile += static_cast<int>(gridDim.x)) {
    float acc[Tile::kColumns / 2];
#pragma unroll
    for (float& c : acc) c = 0.0f;
    for (int t = 0; t < depth_tiles; ++t, at.advance()) {
      ring.wait_full(at);
      const std::uint32_t rows = ring.stage(at), columns = rows + Tile::kRowBytes;
      keep_registers(acc);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < Tile::kDepth / 16; ++step)
        wgmma_bf16<Tile::kMajorRows, Tile::kMajorColumns>(
            acc, bf16_operand<Tile::kMajorRows>(rows, warpgroup * 64, step),
            bf16_operand<Tile::kMajorColumns>(columns, 0, step), true);
      wgmma_commit();
      keep_registers(acc);
      wgmma_wait<1>();
      if (t > 0) ring.release_before(at);
    }
    wgmma_wait<0>();
    keep_registers(acc);
    if (depth_tiles > 0) ring.release_before(at);
    const int row = place.row + warpgroup * 64;
    if (Tile::kSwap || (x.offsets_E1 != nullptr && row + 64 > place.rows))
      write_bf16_tile<Tile, Output>(x, place, acc);
    else
      store_through_boxes<Output, Tile::kBoxes, 1>(
          &d_map, ring.end() + static_cast<std::uint32_t>(warpgroup * Tile::kBoxBytes),
          1 + warpgroup, place.column, place.first_row + row, 0, acc);
  }
  finish_stores();
}

}  // namespace lockstep::ops::cuda

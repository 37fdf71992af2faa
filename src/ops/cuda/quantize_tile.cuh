// Quantizing in tiles of 128 rows x 128 columns: row codes and column codes from one read. A CTA of
// 256 threads holds a tile in registers, a thread eight rows of eight neighbouring columns; the
// column codes are turned in shared memory and leave as whole lines of 128 tokens.
//
// Where a scale covers more than a tile (Scaling::kRow), the same kernel runs twice: once for the
// largest magnitudes, once for the codes.
#pragma once

#include "ops/cuda/quantize_stats.cuh"

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
  std::int64_t row0;  // in the source
  int rows;           // of the source, from row0 on
  int room;           // tokens that a column has in the output; those behind `rows` get zeros
  std::int64_t column_base;   // of the tile's first token in column_codes
  std::int64_t column_scale;  // row of column_scales
};

// The tile of row tile t; `expert` only moves forward from call to call. False behind the last one.
template <Pass kPass>
__device__ inline bool find_tile(const TilePlan& plan, std::int64_t t, std::int64_t& expert,
                                 Tile& tile) {
  if (plan.offsets == nullptr) {
    const std::int64_t per_segment = (plan.segment_rows + kQuantBlock - 1) / kQuantBlock;
    expert = t / per_segment;
    const std::int64_t begin = (t - expert * per_segment) * kQuantBlock;
    tile.row0 = expert * plan.segment_rows + begin;
    tile.rows = tile.room =
        static_cast<int>(min(std::int64_t{kQuantBlock}, plan.segment_rows - begin));
    tile.column_base = expert * plan.K * plan.segment_rows + begin;
    tile.column_scale = expert;
    return true;
  }
  const std::int64_t at = t * kQuantBlock;
  while (expert < plan.experts && __ldg(plan.padded + expert + 1) <= at) ++expert;
  if (expert == plan.experts) return false;
  const std::int32_t first = __ldg(plan.offsets + expert);
  const std::int64_t begin = at - __ldg(plan.padded + expert);
  const std::int64_t left = __ldg(plan.offsets + expert + 1) - first - begin;
  tile.row0 = first + begin;
  tile.rows = static_cast<int>(max(std::int64_t{0}, min(std::int64_t{kQuantBlock}, left)));
  tile.room = kQuantBlock;
  tile.column_base = at;
  tile.column_scale = kPass == Pass::kBlocks ? t : expert;
  return true;
}

struct TileMemory {
  std::uint32_t largest[kTileThreads / 32][kQuantBlock];  // of each warp's rows, by column
  float inverse[kQuantBlock];
  // Column c's tokens in pieces of eight; piece i lies at place i ^ (c / 8), so that neither the
  // writes (a warp: 16 columns, eight apart) nor the reads (a column) meet in a bank.
  alignas(16) std::uint8_t codes[kQuantBlock][kQuantBlock];
};

template <Pass kPass, bool kVector, typename Values>
__device__ inline void quantize_tile_rows(const TilePlan& plan, const Tile& tile,
                                          const Values (&x)[8], std::int64_t column, int n,
                                          std::int64_t width, ThreadStats& stats) {
  const int lane = threadIdx.x % 32, first = static_cast<int>(threadIdx.x) / 16 * 8;
  const int own = first + lane % 16 / 2;  // the row whose scale this lane works out
  const bool owner = lane % 2 == 0 && own < tile.rows;
  float inverse = 1.0f;
  if constexpr (kPass == Pass::kEncode) {
    if (own < tile.rows) inverse = 1.0f / __ldg(plan.row_scales + tile.row0 + own);
  } else {
    const std::uint32_t amax = row_largest(x);
    if constexpr (kPass == Pass::kLargest) {
      if (owner) atomicMax(plan.row_largest + tile.row0 + own, amax);
      return;
    }
    const float s = scale_of(amax, plan.pow2);
    inverse = 1.0f / s;
    if (owner) {
      plan.row_scales[column / kQuantBlock * plan.M + tile.row0 + own] = s;
      if (plan.stats != nullptr) stats.count_block(amax);
    }
  }
  Fp8* to = plan.row_codes + (tile.row0 + first) * width + column;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float inv = __shfl_sync(kAllLanes, inverse, (lane & 16) + 2 * i);
    const uint2 codes = encode8(x[i], inv);
    if (first + i >= tile.rows) continue;
    store_codes<kVector>(to + i * width, codes, n);
    if (plan.stats == nullptr || n <= 0) continue;
    stats.values += min(n, 8);
    if (inv == inv)
      stats.flushed += nonzero(x[i]) - nonzero_codes(codes.x) - nonzero_codes(codes.y);
  }
}

template <Pass kPass, bool kVector, typename Values>
__device__ inline void quantize_tile_columns(const TilePlan& plan, const Tile& tile,
                                             const Values (&x)[8], std::int64_t column0,
                                             int columns, std::int64_t width, TileMemory& memory,
                                             ThreadStats& stats) {
  const int thread = static_cast<int>(threadIdx.x), tc = thread % 16, tr = thread / 16;
  if constexpr (kPass != Pass::kEncode) {
    store_column_largest(x, memory.largest[thread / 32]);
    __syncthreads();
  }
  const bool counts = plan.stats != nullptr && plan.row_codes == nullptr;
  if (thread < columns) {
    float* scale = plan.column_scales + tile.column_scale * width + column0 + thread;
    if constexpr (kPass == Pass::kEncode) {
      memory.inverse[thread] = 1.0f / *scale;
    } else {
      std::uint32_t amax = 0;
#pragma unroll
      for (int w = 0; w < kTileThreads / 32; ++w)
        amax = max(amax, load_column_largest<Values>(memory.largest[w], thread));
      if constexpr (kPass == Pass::kLargest) {
        atomicMax(plan.column_largest + tile.column_scale * width + column0 + thread, amax);
      } else {
        const float s = scale_of(amax, plan.pow2);
        *scale = s;
        memory.inverse[thread] = 1.0f / s;
        if (counts && tile.rows > 0) stats.count_block(amax);
      }
    }
  }
  __syncthreads();
  if constexpr (kPass == Pass::kLargest) return;
  // Padding gets zeros whatever its scale is.
  const int rows = min(8, max(0, tile.rows - tr * 8));
  const std::uint32_t low = rows >= 4 ? 0xFFFFFFFFu : (1u << (rows * 8)) - 1;
  const std::uint32_t high = rows >= 8 ? 0xFFFFFFFFu : rows <= 4 ? 0u : (1u << (rows * 8 - 32)) - 1;
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    const float inv = memory.inverse[tc * 8 + c];
    const auto y = [&](int r) { return value(x[r], c) * inv; };
    const uint2 codes = {encode4(y(0), y(1), y(2), y(3)) & low,
                         encode4(y(4), y(5), y(6), y(7)) & high};
    *reinterpret_cast<uint2*>(&memory.codes[tc * 8 + c][(tr ^ tc) * 8]) = codes;
    if (!counts || tc * 8 + c >= columns) continue;
    stats.values += rows;
    if (inv != inv) continue;
#pragma unroll
    for (int r = 0; r < 8; ++r) stats.flushed += value(x[r], c) != 0.0f ? 1 : 0;
    stats.flushed -= nonzero_codes(codes.x) + nonzero_codes(codes.y);
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int at = thread + kTileThreads * k, c = at / 8, piece = at % 8, turn = c / 8;
    if (c >= columns || piece * 16 >= tile.room) continue;
    const uint4 w = *reinterpret_cast<const uint4*>(&memory.codes[c][(piece ^ (turn / 2)) * 16]);
    const uint4 codes = turn % 2 != 0 ? make_uint4(w.z, w.w, w.x, w.y) : w;
    Fp8* to =
        plan.column_codes + tile.column_base + (column0 + c) * plan.column_stride + piece * 16;
    if constexpr (kVector) {
      *reinterpret_cast<uint4*>(to) = codes;
    } else {
      const std::uint32_t part[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
      for (int i = 0; i < 16; ++i)
        if (piece * 16 + i < tile.room) to[i] = static_cast<Fp8>(part[i / 4] >> (i % 4 * 8));
    }
  }
}

// A source gives eight neighbouring columns of a row, of each of its parts: parts of K columns lie
// side by side in the outputs. Reading a row may write what belongs to it.
template <typename Source, Pass kPass, bool kVector>
__global__ void __launch_bounds__(kTileThreads, Source::kCtas)
    quantize_tiles(const Source source, const TilePlan plan) {
  using Values = typename Source::Values;
  constexpr int kParts = Source::kParts;
  __shared__ TileMemory memory;
  ThreadStats stats;
  const auto column_tiles = static_cast<unsigned>((plan.K + kQuantBlock - 1) / kQuantBlock);
  const auto tiles = static_cast<unsigned>(plan.row_tiles) * column_tiles;
  const std::int64_t width = kParts * plan.K;
  const int tc = static_cast<int>(threadIdx.x) % 16, first = static_cast<int>(threadIdx.x) / 16 * 8;
  std::int64_t expert = 0;
  for (unsigned t = blockIdx.x; t < tiles; t += gridDim.x) {
    Tile tile;
    if (!find_tile<kPass>(plan, t / column_tiles, expert, tile)) break;
    const std::int64_t column0 = std::int64_t{t % column_tiles} * kQuantBlock;
    const int columns = static_cast<int>(min(std::int64_t{kQuantBlock}, plan.K - column0));
    const int n = columns - tc * 8;
    Values x[kParts][8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      source.template load<kPass, kVector>(tile.row0 + first + i, column0 + tc * 8,
                                           first + i < tile.rows ? n : 0, x, i);
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const std::int64_t at = p * plan.K + column0;
      if (kPass == Pass::kLargest ? plan.row_largest != nullptr : plan.row_codes != nullptr)
        quantize_tile_rows<kPass, kVector>(plan, tile, x[p], at + tc * 8, n, width, stats);
      if (kPass == Pass::kLargest ? plan.column_largest != nullptr : plan.column_codes != nullptr)
        quantize_tile_columns<kPass, kVector>(plan, tile, x[p], at, columns, width, memory, stats);
    }
  }
  if (kPass != Pass::kLargest && plan.stats != nullptr) flush_stats(stats, plan.stats);
}

}  // namespace lockstep::ops::cuda

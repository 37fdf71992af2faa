// The codes of a tile of 128 x 128 whose values are in registers: a thread has eight neighbouring
// columns of eight rows. Row codes leave as they are; column codes are turned in shared memory and
// leave as whole lines of 128 tokens.
#pragma once

#include "ops/cuda/quantize_tile_scales.cuh"

namespace lockstep::ops::cuda {

// inverse: 1 / s of the lane's row. The thread has n columns from `column` on.
template <bool kVector, typename Values>
__device__ inline void quantize_tile_rows(const TilePlan& plan, const Tile& tile,
                                          const Values (&x)[8], std::int64_t column, int n,
                                          std::int64_t width, float inverse, ThreadStats& stats) {
  const int first = static_cast<int>(threadIdx.x) / 16 * 8;
  const int rows = n > 0 ? min(8, max(0, tile.rows - first)) : 0;
  Fp8* to = plan.row_codes + std::int64_t{tile.row0 + first} * width + column;
  // Bit i of a byte: whether its code of row i is not zero.
  std::uint32_t left = 0, right = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i, to += width) {
    const uint2 codes = encode8(x[i], __shfl_sync(kAllLanes, inverse, 2 * i, 16));
    if (i < rows) store_codes<kVector>(to, codes, n);
    if (plan.stats == nullptr) continue;
    left = left >> 1 | (((codes.x & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) & 0x80808080u);
    right = right >> 1 | (((codes.y & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) & 0x80808080u);
  }
  if (plan.stats == nullptr || rows == 0) return;
  stats.values += min(n, 8) * rows;
  const std::uint32_t both = left & right;
  if (both == 0xFFFFFFFFu) return;
  const std::uint32_t there = 0xFFu >> (8 - rows), bits = there * 0x01010101u;
  stats.flushed += 8 * rows - __popc(left & bits) - __popc(right & bits);
  // Bit i: whether a code of row i is zero, perhaps because its value is.
  const std::uint32_t zero = ~(both & both >> 8 & both >> 16 & both >> 24) & there;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if ((zero >> i & 1) != 0) stats.flushed -= zeros(x[i]);
}

// inverses: 1 / s of the tile's columns. kCounts: for QuantStats.
template <bool kVector, bool kCounts, typename Values>
__device__ inline void quantize_tile_columns(const TilePlan& plan, const Tile& tile,
                                             const Values (&x)[8], std::int64_t column0,
                                             int columns, const float* inverses, TileMemory& memory,
                                             ThreadStats& stats) {
  const int thread = static_cast<int>(threadIdx.x), tc = thread % 16, tr = thread / 16;
  const int rows = min(8, max(0, tile.rows - tr * 8));
  const auto place = [&](int c) {
    return reinterpret_cast<uint2*>(&memory.codes[tc * 8 + c][(tr ^ tc) * 8]);
  };
  float inverse[8];
  *reinterpret_cast<float4*>(inverse) = *reinterpret_cast<const float4*>(inverses + tc * 8);
  *reinterpret_cast<float4*>(inverse + 4) = *reinterpret_cast<const float4*>(inverses + tc * 8 + 4);
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    const auto y = [&](int r) { return value(x[r], c) * inverse[c]; };
    const uint2 codes = {encode4(y(0), y(1), y(2), y(3)), encode4(y(4), y(5), y(6), y(7))};
    *place(c) = codes;
    if (!kCounts || tc * 8 + c >= columns) continue;
    stats.values += rows;
    if (inverse[c] != inverse[c]) continue;
#pragma unroll
    for (int r = 0; r < 8; ++r) stats.flushed += value(x[r], c) != 0.0f ? 1 : 0;
    stats.flushed -= nonzero_codes(codes.x) + nonzero_codes(codes.y);
  }
  if (rows < 8) {  // padding gets zeros whatever its scale is
    const auto mask = [&](int from) {
      return rows >= from + 4 ? 0xFFFFFFFFu : rows <= from ? 0u : (1u << ((rows - from) * 8)) - 1;
    };
    for (int c = 0; c < 8; ++c) {
      const uint2 codes = *place(c);
      *place(c) = {codes.x & mask(0), codes.y & mask(4)};
    }
  }
  __syncthreads();
  const int c = thread / 8, piece = thread % 8;
  if (piece * 16 >= tile.room) return;
  Fp8* to = plan.column_codes + tile.column_base + (column0 + c) * plan.column_stride + piece * 16;
#pragma unroll
  for (int k = 0; k < 4; ++k, to += 32 * plan.column_stride) {
    if (c + 32 * k >= columns) break;
    const auto eight = [&](int i) {
      const int turn = c / 8 + 4 * k;
      return *reinterpret_cast<const uint2*>(&memory.codes[c + 32 * k][(i ^ turn) * 8]);
    };
    const uint2 low = eight(2 * piece), high = eight(2 * piece + 1);
    store_column_codes<kVector>(to, make_uint4(low.x, low.y, high.x, high.y),
                                tile.room - piece * 16);
  }
}

// One part of a tile, whose columns are those of the source from part * K on. row_inverse: of
// known_scales, which has been called where scales are known. kColumnsAlone: of the source.
template <Pass kPass, bool kVector, int kParts, bool kColumnsAlone, typename Values>
__device__ inline void quantize_part(const TilePlan& plan, const Tile& tile, const Values (&x)[8],
                                     int part, float row_inverse, TileMemory& memory,
                                     ThreadStats& stats) {
  const std::int64_t width = kParts * plan.K, column0 = part * plan.K + tile.column0;
  const int own = static_cast<int>(threadIdx.x) % 16 * 8;
  const bool rows =
      kPass == Pass::kLargest ? plan.row_largest != nullptr : plan.row_codes != nullptr;
  const bool columns =
      kPass == Pass::kLargest ? plan.column_largest != nullptr : plan.column_codes != nullptr;
  if (kPass != Pass::kEncode && rows)
    row_inverse = tile_row_scales<kPass>(plan, tile, x, column0, stats);
  // While some warps work out the columns' scales, the others go on with the rows' codes.
  if (kPass != Pass::kEncode && columns)
    tile_column_scales<kPass>(plan, tile, x, column0, tile.columns, width, memory, stats);
  if (kPass != Pass::kLargest && rows)
    quantize_tile_rows<kVector>(plan, tile, x, column0 + own, tile.columns - own, width,
                                row_inverse, stats);
  __syncthreads();  // of rows alone, too: thread 0 finds tiles ahead of the others by two at most
  if constexpr (kPass != Pass::kLargest) {
    if (!columns) return;
    const float* inverses = memory.inverse + (kPass == Pass::kEncode ? part * kQuantBlock : 0);
    if (kColumnsAlone && plan.stats != nullptr && !rows)
      quantize_tile_columns<kVector, true>(plan, tile, x, column0, tile.columns, inverses, memory,
                                           stats);
    else
      quantize_tile_columns<kVector, false>(plan, tile, x, column0, tile.columns, inverses, memory,
                                            stats);
  }
}

}  // namespace lockstep::ops::cuda

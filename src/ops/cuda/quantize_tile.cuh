// Quantizing in tiles of 128 rows x 128 columns: row codes and column codes from one read. A CTA
// of 256 threads holds a tile in registers, a thread eight neighbouring columns of eight rows; the
// column codes are turned in shared memory
// and leave as whole lines of 128 tokens.
//
// Where a scale covers more than a tile (Scaling::kRow), the same kernel runs twice: once for the
// largest magnitudes, once for the codes.
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
  alignas(16) float inverse[kQuantBlock];
  Walk walk;  // of the ring, where one thread finds the tiles, number i at i % 4
  Tile tiles[4];
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
  // Bit i of a byte: whether its code of row i is not zero.
  std::uint32_t left = 0, right = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i, to += width) {
    const uint2 codes = encode8(x[i], __shfl_sync(kAllLanes, inverse, (lane & 16) + 2 * i));
    if (first + i < tile.rows) store_codes<kVector>(to, codes, n);
    if (plan.stats == nullptr) continue;
    left = left >> 1 | (((codes.x & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) & 0x80808080u);
    right = right >> 1 | (((codes.y & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) & 0x80808080u);
  }
  if (plan.stats == nullptr || n <= 0) return;
  const int rows = min(8, max(0, tile.rows - first));
  stats.values += min(n, 8) * rows;
  if ((left & right) == 0xFFFFFFFFu) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const std::uint32_t bits = 0x01010101u << i;
    const int nonzero = __popc(left & bits) + __popc(right & bits);
    if (nonzero < 8 && i < rows) stats.flushed += 8 - nonzero - zeros(x[i]);
  }
}

// The scales of the tile's columns, one a thread; a barrier has to follow, behind which `inverse`
// holds what the codes need.
template <Pass kPass, typename Values>
__device__ inline void tile_column_scales(const TilePlan& plan, const Tile& tile,
                                          const Values (&x)[8], std::int64_t column0, int columns,
                                          std::int64_t width, TileMemory& memory,
                                          ThreadStats& stats) {
  const int thread = static_cast<int>(threadIdx.x);
  if constexpr (kPass != Pass::kEncode) {
    __syncthreads();  // the codes before have been read
    store_column_largest(x, memory.largest[thread / 32]);
    __syncthreads();
  }
  if (thread >= columns) return;
  const std::int64_t at = tile.column_scale * width + column0 + thread;
  if constexpr (kPass == Pass::kEncode) {
    memory.inverse[thread] = 1.0f / __ldg(plan.column_scales + at);
    return;
  }
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

template <bool kVector, typename Values>
__device__ inline void quantize_tile_columns(const TilePlan& plan, const Tile& tile,
                                             const Values (&x)[8], std::int64_t column0,
                                             int columns, TileMemory& memory, ThreadStats& stats) {
  const int thread = static_cast<int>(threadIdx.x), tc = thread % 16, tr = thread / 16;
  const bool counts = plan.stats != nullptr && plan.row_codes == nullptr;
  // Padding gets zeros whatever its scale is.
  const int rows = min(8, max(0, tile.rows - tr * 8));
  const auto mask = [&](int from) {
    return rows >= from + 4 ? 0xFFFFFFFFu : rows <= from ? 0u : (1u << ((rows - from) * 8)) - 1;
  };
  const std::uint32_t low = mask(0), high = mask(4);
  float inverse[8];
  *reinterpret_cast<float4*>(inverse) = *reinterpret_cast<const float4*>(memory.inverse + tc * 8);
  *reinterpret_cast<float4*>(inverse + 4) =
      *reinterpret_cast<const float4*>(memory.inverse + tc * 8 + 4);
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    const float inv = inverse[c];
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
  const int c = thread / 8, piece = thread % 8;
  if (piece * 16 >= tile.room) return;
  Fp8* to = plan.column_codes + tile.column_base + (column0 + c) * plan.column_stride + piece * 16;
#pragma unroll
  for (int k = 0; k < 4; ++k, to += 32 * plan.column_stride) {
    const int turn = (c + 32 * k) / 8;
    if (c + 32 * k >= columns) break;
    const uint4 w =
        *reinterpret_cast<const uint4*>(&memory.codes[c + 32 * k][(piece ^ (turn / 2)) * 16]);
    store_column_codes<kVector>(to, turn % 2 != 0 ? make_uint4(w.z, w.w, w.x, w.y) : w,
                                tile.room - piece * 16);
  }
}

// One part of a tile, whose columns are those of the source from `at` on.
template <Pass kPass, bool kVector, int kParts, typename Values>
__device__ inline void quantize_part(const TilePlan& plan, const Tile& tile, const Values (&x)[8],
                                     std::int64_t at, TileMemory& memory, ThreadStats& stats) {
  const std::int64_t width = kParts * plan.K;
  const int own = static_cast<int>(threadIdx.x) % 16 * 8;
  const bool rows =
      kPass == Pass::kLargest ? plan.row_largest != nullptr : plan.row_codes != nullptr;
  const bool columns =
      kPass == Pass::kLargest ? plan.column_largest != nullptr : plan.column_codes != nullptr;
  // The columns' scales come first: while some warps work them out, the others go on with the rows.
  if (columns)
    tile_column_scales<kPass>(plan, tile, x, at + tile.column0, tile.columns, width, memory, stats);
  if (rows)
    quantize_tile_rows<kPass, kVector>(plan, tile, x, at + tile.column0 + own, tile.columns - own,
                                       width, stats);
  if (!columns) return;
  __syncthreads();
  if constexpr (kPass != Pass::kLargest)
    quantize_tile_columns<kVector>(plan, tile, x, at + tile.column0, tile.columns, memory, stats);
}

// The tiles of a CTA's walk where rows are gathered, through a ring: the first four rows of each
// thread and its last four follow each other around it.
template <Pass kPass, typename Source>
__device__ inline void quantize_ring(const Source& source, const TilePlan& plan, uint4* stage,
                                     TileMemory& memory, ThreadStats& stats) {
  const int thread = static_cast<int>(threadIdx.x);
  uint4* slots = stage + thread;
  constexpr int kHalf = 4 * kTileThreads;
  const auto find = [&](unsigned number) {
    Tile& tile = memory.tiles[number % 4];
    if (next_tile<kPass>(plan, memory.walk, tile)) return;
    tile = {};
    tile.rows = -1;
  };
  struct Half {
    const Bf16* column;  // in row 0
    int rows;
    std::int32_t gathered[4];
  };
  const auto half_of = [&](unsigned number, int half) {
    const Tile& tile = memory.tiles[number % 4];
    const int row = thread / 16 * 8 + 4 * half, column = thread % 16 * 8;
    Half h;
    h.column = source.at(0, 0, tile.column0 + column);
    h.rows = column < tile.columns ? tile.rows - row : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      h.gathered[i] = i < h.rows ? source.gathered(tile.row0 + row + i) : 0;
    return h;
  };
  const auto fetch = [&](const Half& h, int place) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      copy_eight(slots + place * kHalf + i * kTileThreads,
                 h.column + h.gathered[i] * source.stride(0), i < h.rows);
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  if (thread == 0) {
    memory.walk = start_walk(plan);
    for (unsigned i = 0; i < 3; ++i) find(i);
  }
  __syncthreads();
  fetch(half_of(0, 0), 0);
  fetch(half_of(0, 1), 1);
  fetch(half_of(1, 0), 2);
  int place = 0;
  for (unsigned number = 0;; ++number) {
    const Tile tile = memory.tiles[number % 4];
    if (tile.rows < 0) break;
    if (thread == 0) find(number + 3);
    const Half second = half_of(number + 1, 1), first = half_of(number + 2, 0);
    asm volatile("cp.async.wait_group 1;" ::: "memory");  // all but the next tile's first half
    const int after = place == 2 ? 0 : place + 1;
    Bf16x8 x[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      read_values(slots + place * kHalf + i * kTileThreads, x[i]);
      read_values(slots + after * kHalf + i * kTileThreads, x[4 + i]);
    }
    fetch(second, place);
    fetch(first, after);
    place = after == 2 ? 0 : after + 1;
    quantize_part<kPass, true, 1>(plan, tile, x, 0, memory, stats);
    if (kPass == Pass::kLargest ? plan.column_largest == nullptr : plan.column_codes == nullptr)
      __syncthreads();  // nothing else keeps thread 0 from finding tiles ahead
  }
}

// The tiles of a CTA's walk. (A function of its own needs fewer registers than the same text in the
// kernel.)
template <Pass kPass, bool kVector, typename Source>
__device__ inline void quantize_walk(const Source& source, const TilePlan& plan, uint4* stage,
                                     TileMemory& memory, ThreadStats& stats) {
  using Values = typename Source::Values;
  constexpr int kParts = Source::kParts, kInputs = Source::kInputs;
  uint4* slots = stage + threadIdx.x;
  auto* table = reinterpret_cast<float*>(stage + 8 * kInputs * kTileThreads);
  Walk walk = start_walk(plan);
  Tile next;
  bool more = next_tile<kPass>(plan, walk, next);
  Fetch<Source> fetch{};
  [[maybe_unused]] Bf16x8 held[8];
  const auto fetch_inputs = [&](int begin, int end) {
    for (int j = begin; j < end; ++j) fetch_input<kVector>(source, fetch, j, slots);
  };
  const auto fetch_all = [&] {
    fetch_inputs(0, kInputs);
    if constexpr (Source::kHeld != 0)
#pragma unroll
      for (int i = 0; i < 8; ++i) held[i] = fetch_held<kVector>(source, fetch, i);
  };
  if (more) fetch = start_fetch(source, next);
  if (kVector && more) fetch_all();
  if constexpr (Source::kTableBytes != 0) {
    Source::fill_table(table);
    __syncthreads();
  }
  while (more) {
    const Tile tile = next;
    const Fetch<Source> here = fetch;
    if constexpr (!kVector) fetch_all();
    more = next_tile<kPass>(plan, walk, next);
    if (more) fetch = start_fetch(source, next);
    const bool ahead = kVector && more;
    if constexpr (kVector) asm volatile("cp.async.wait_all;" ::: "memory");
    const auto quantize = [&](const Values(&x)[8], int part) {
      quantize_part<kPass, kVector, kParts>(plan, tile, x, part * plan.K, memory, stats);
    };
    Values x[8];
    const auto rows_left = [&](int i) { return i < here.rows ? here.columns : 0; };
    if constexpr (!Source::kCombines) {
#pragma unroll
      for (int i = 0; i < 8; ++i) read_values(slots + i * kTileThreads, x[i]);
      if (kVector && more) fetch_inputs(0, 1);
      quantize(x, 0);
    } else if constexpr (kParts == 1) {
      // A row's slots are filled again once it has been read, one row ahead of its use.
      const auto columns = source.template columns<kVector>(here.column, here.columns);
      Bf16x8 row[2][kInputs];
      const Bf16* from[kInputs];
#pragma unroll
      for (int j = 0; j < kInputs; ++j) {
        read_values(slots + j * kTileThreads, row[0][j]);
        from[j] = first_eight(source, fetch, j);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        uint4* own = slots + i * kInputs * kTileThreads;
#pragma unroll
        for (int j = 0; j < kInputs; ++j) {
          if (i < 7) read_values(own + (kInputs + j) * kTileThreads, row[(i + 1) % 2][j]);
          if (ahead) fetch_eight<kVector>(source, fetch, from[j], j, i, own + j * kTileThreads);
          from[j] += source.stride(j);
        }
        x[i] = source.template combine<kPass, kVector>(row[i % 2], columns, table, here.row + i,
                                                       here.column, rows_left(i));
      }
      quantize(x, 0);
    } else {
      const auto columns = source.template columns<kVector>(here.column, here.columns);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        source.template combine<kPass, kVector>(slots + i * kInputs * kTileThreads, held[i],
                                                columns, table, here.row + i, here.column,
                                                rows_left(i));
        if (ahead) held[i] = fetch_held<kVector>(source, fetch, i);
      }
#pragma unroll 1
      for (int p = 0; p < kParts; ++p) {
#pragma unroll
        for (int i = 0; i < 8; ++i) read_values(slots + (i * kInputs + p) * kTileThreads, x[i]);
        if (ahead) fetch_inputs(p, p + 1);
        quantize(x, p);
      }
    }
  }
}
template <typename Source, Pass kPass, bool kVector>
__global__ void __launch_bounds__(kTileThreads, Source::kCtas)
    quantize_tiles(const Source source, const TilePlan plan) {
  extern __shared__ uint4 stage[];
  __shared__ TileMemory memory;
  ThreadStats stats;
  if constexpr (kVector && kInRing<Source>)
    quantize_ring<kPass>(source, plan, stage, memory, stats);
  else
    quantize_walk<kPass, kVector>(source, plan, stage, memory, stats);
  if (kPass != Pass::kLargest && plan.stats != nullptr) flush_stats(stats, plan.stats);
}

}  // namespace lockstep::ops::cuda

// Quantizing in tiles of 128 rows x 128 columns: row codes and column codes from one read. A CTA
// holds a tile in registers, a thread eight neighbouring columns of eight rows (of four, where the
// CTA has 512 threads, for sources that work more); the column codes are turned in shared memory
// and leave as whole lines of 128 tokens.
//
// Where a scale covers more than a tile (Scaling::kRow), the same kernel runs twice: once for the
// largest magnitudes, once for the codes.
#pragma once

#include "ops/cuda/quantize_stats.cuh"
#include "ops/cuda/quantize_walk.cuh"

namespace lockstep::ops::cuda {

struct TileMemory {
  union {
    std::uint32_t largest[16][kQuantBlock];  // of each warp's rows, by column
    // Column c's tokens in pieces of eight; piece i lies at place i ^ (c / 8), so that neither the
    // writes (a warp: 16 columns, eight apart) nor the reads (a column) meet in a bank.
    alignas(16) std::uint8_t codes[kQuantBlock][kQuantBlock];
  };
  alignas(16) float inverse[kQuantBlock];
};

template <Pass kPass, bool kVector, typename Values, int kRows>
__device__ inline void quantize_tile_rows(const TilePlan& plan, const Tile& tile,
                                          const Values (&x)[kRows], std::int64_t column, int n,
                                          std::int64_t width, ThreadStats& stats) {
  constexpr int kLanes = 16 / kRows;  // that work out the scale of the same row
  const int lane = threadIdx.x % 32, first = static_cast<int>(threadIdx.x) / 16 * kRows;
  const int own = first + lane % 16 / kLanes;  // the row whose scale this lane works out
  const bool owner = lane % kLanes == 0 && own < tile.rows;
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
  // Bit 8 - kRows + i of a byte: whether its code of row i is not zero.
  std::uint32_t left = 0, right = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i, to += width) {
    const uint2 codes = encode8(x[i], __shfl_sync(kAllLanes, inverse, (lane & 16) + kLanes * i));
    if (first + i < tile.rows) store_codes<kVector>(to, codes, n);
    if (plan.stats == nullptr) continue;
    left = left >> 1 | (((codes.x & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) & 0x80808080u);
    right = right >> 1 | (((codes.y & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) & 0x80808080u);
  }
  if (plan.stats == nullptr || n <= 0) return;
  const int rows = min(kRows, max(0, tile.rows - first));
  stats.values += min(n, 8) * rows;
  constexpr std::uint32_t kAll = (0xFFu << (8 - kRows) & 0xFFu) * 0x01010101u;
  if ((left & right) == kAll) return;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const std::uint32_t bits = 0x01010101u << (8 - kRows + i);
    const int nonzero = __popc(left & bits) + __popc(right & bits);
    if (nonzero < 8 && i < rows) stats.flushed += 8 - nonzero - zeros(x[i]);
  }
}

// The scales of the tile's columns, one a thread; a barrier has to follow, behind which `inverse`
// holds what the codes need.
template <Pass kPass, typename Values, int kRows>
__device__ inline void tile_column_scales(const TilePlan& plan, const Tile& tile,
                                          const Values (&x)[kRows], std::int64_t column0,
                                          int columns, std::int64_t width, TileMemory& memory,
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
  for (int w = 0; w < kQuantBlock / (2 * kRows); ++w)
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

template <bool kVector, typename Values, int kRows>
__device__ inline void quantize_tile_columns(const TilePlan& plan, const Tile& tile,
                                             const Values (&x)[kRows], std::int64_t column0,
                                             int columns, TileMemory& memory, ThreadStats& stats) {
  const int thread = static_cast<int>(threadIdx.x), tc = thread % 16, tr = thread / 16;
  const bool counts = plan.stats != nullptr && plan.row_codes == nullptr;
  // Padding gets zeros whatever its scale is.
  const int rows = min(kRows, max(0, tile.rows - tr * kRows));
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
    uint2 codes = {encode4(y(0), y(1), y(2), y(3)) & low, 0};
    std::uint8_t* column = memory.codes[tc * 8 + c];
    if constexpr (kRows == 8) {
      codes.y = encode4(y(4), y(5), y(6), y(7)) & high;
      *reinterpret_cast<uint2*>(column + (tr ^ tc) * 8) = codes;
    } else {
      *reinterpret_cast<std::uint32_t*>(column + (tr / 2 ^ tc) * 8 + tr % 2 * 4) = codes.x;
    }
    if (!counts || tc * 8 + c >= columns) continue;
    stats.values += rows;
    if (inv != inv) continue;
#pragma unroll
    for (int r = 0; r < kRows; ++r) stats.flushed += value(x[r], c) != 0.0f ? 1 : 0;
    stats.flushed -= nonzero_codes(codes.x) + nonzero_codes(codes.y);
  }
  __syncthreads();
  constexpr int kStep = 256 / kRows;  // columns that leave at once
  const int c = thread / 8, piece = thread % 8;
  if (piece * 16 >= tile.room) return;
  Fp8* to = plan.column_codes + tile.column_base + (column0 + c) * plan.column_stride + piece * 16;
#pragma unroll
  for (int k = 0; k < kQuantBlock / kStep; ++k, to += kStep * plan.column_stride) {
    const int turn = (c + kStep * k) / 8;
    if (c + kStep * k >= columns) break;
    const uint4 w =
        *reinterpret_cast<const uint4*>(&memory.codes[c + kStep * k][(piece ^ (turn / 2)) * 16]);
    store_column_codes<kVector>(to, turn % 2 != 0 ? make_uint4(w.z, w.w, w.x, w.y) : w,
                                tile.room - piece * 16);
  }
}

// A source gives eight neighbouring columns of a row, of each of its parts (which lie side by side,
// K columns each, in the outputs), from kInputs eights in memory, and kHeld (0 or 1) more:
//   at(input, row, column), stride(input)   where an input lies, and its next row
//   gathered(row)                           with kGather: the row to read for it
//   columns<kVector>(column, n)             what belongs to the columns alone, read once a tile
//   fill_table(table)                       with kTableBytes: a table that the CTA fills first
//   combine<kPass, kVector>(...)            with kCombines: turns a row's inputs into the values of
//                                           its parts, in place where there are two; it may write
//                                           what belongs to them
// Inputs wait in shared memory, where a thread has slots of its own, the held one in registers; the
// inputs of the next tile take them as soon as they are free. Where rows are not aligned, nothing
// is fetched ahead.
template <typename Source>
inline constexpr int kStageBytes =
    Source::kInputs* kQuantBlock* kQuantBlock * 2 + Source::kTableBytes;
// Rows of a thread.
template <typename Source>
inline constexpr int kTileRows = kQuantBlock * 16 / Source::kThreads;

template <typename Source>
struct Fetch {
  std::int64_t row, column;  // this thread's first
  int rows, columns;         // rows from its first (0 behind the last column), columns likewise
  std::int32_t gathered[Source::kGather ? kTileRows<Source> : 1];
};
template <typename Source>
__device__ inline Fetch<Source> start_fetch(const Source& source, const Tile& tile) {
  const int thread = static_cast<int>(threadIdx.x), first = thread / 16 * kTileRows<Source>;
  Fetch<Source> f;
  f.row = tile.row0 + first, f.column = tile.column0 + thread % 16 * 8;
  f.columns = tile.columns - thread % 16 * 8;
  f.rows = f.columns > 0 ? tile.rows - first : 0;
  if constexpr (Source::kGather)
#pragma unroll
    for (int i = 0; i < kTileRows<Source>; ++i)
      f.gathered[i] = i < f.rows ? source.gathered(f.row + i) : 0;
  return f;
}
// One input of the thread's rows into its slots.
template <bool kVector, typename Source>
__device__ inline void fetch_input(const Source& source, const Fetch<Source>& f, int input,
                                   uint4* slots) {
  const std::int64_t stride = source.stride(input);
  const Bf16* from = source.at(input, Source::kGather ? 0 : f.row, f.column);
  uint4* to = slots + input * Source::kThreads;
#pragma unroll
  for (int i = 0; i < kTileRows<Source>; ++i, to += Source::kInputs * Source::kThreads) {
    const Bf16* at = from;
    if constexpr (Source::kGather) at += f.gathered[i] * stride;
    if constexpr (kVector)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                       static_cast<unsigned>(__cvta_generic_to_shared(to))),
                   "l"(at), "r"(i < f.rows ? 16 : 0)
                   : "memory");
    else
      *to = shared8(load8<false>(at, i < f.rows ? f.columns : 0));
    if constexpr (!Source::kGather) from += stride;
  }
}

__device__ inline void read_values(const uint4* slots, Bf16x8& x) { x = shared8(slots); }
__device__ inline void write_values(uint4* slots, const Bf16x8& x) { *slots = shared8(x); }

// The held input of the thread's rows.
template <bool kVector, typename Source>
__device__ inline void fetch_held(const Source& source, const Fetch<Source>& f,
                                  Bf16x8 (&held)[kTileRows<Source>]) {
  const std::int64_t stride = source.stride(Source::kInputs);
  const Bf16* from = source.at(Source::kInputs, f.row, f.column);
#pragma unroll
  for (int i = 0; i < kTileRows<Source>; ++i, from += stride)
    held[i] = load8<kVector>(from, i < f.rows ? f.columns : 0);
}

// The tiles of a CTA's walk.
template <Pass kPass, bool kVector, typename Source>
__device__ inline void quantize_walk(const Source& source, const TilePlan& plan, Walk& walk,
                                     uint4* stage, TileMemory& memory, ThreadStats& stats) {
  using Values = typename Source::Values;
  constexpr int kParts = Source::kParts, kInputs = Source::kInputs;
  constexpr int kThreads = Source::kThreads, kRows = kTileRows<Source>;
  uint4* slots = stage + threadIdx.x;
  auto* table = reinterpret_cast<float*>(stage + kRows * kInputs * kThreads);
  const std::int64_t width = kParts * plan.K;
  Tile next;
  bool more = next_tile<kPass>(plan, walk, next);
  Fetch<Source> fetch{};
  [[maybe_unused]] Bf16x8 held[kRows];
  const auto fetch_inputs = [&](int begin, int end) {
    for (int j = begin; j < end; ++j) fetch_input<kVector>(source, fetch, j, slots);
  };
  if (more) fetch = start_fetch(source, next);
  if (kVector && more) {
    fetch_inputs(0, kInputs);
    if constexpr (Source::kHeld != 0) fetch_held<kVector>(source, fetch, held);
  }
  if constexpr (Source::kTableBytes != 0) {
    Source::fill_table(table);
    __syncthreads();
  }
  while (more) {
    const Tile tile = next;
    const Fetch<Source> here = fetch;
    if constexpr (!kVector) {
      fetch_inputs(0, kInputs);
      if constexpr (Source::kHeld != 0) fetch_held<kVector>(source, fetch, held);
    }
    more = next_tile<kPass>(plan, walk, next);
    if (more) fetch = start_fetch(source, next);
    if constexpr (kVector) asm volatile("cp.async.wait_all;" ::: "memory");
    // The columns' scales first: while some warps work them out, the others go on with the rows.
    const auto quantize = [&](const Values(&x)[kRows], int part) {
      const std::int64_t at = part * plan.K;
      const bool rows =
          kPass == Pass::kLargest ? plan.row_largest != nullptr : plan.row_codes != nullptr;
      const bool columns =
          kPass == Pass::kLargest ? plan.column_largest != nullptr : plan.column_codes != nullptr;
      if (columns)
        tile_column_scales<kPass>(plan, tile, x, at + tile.column0, tile.columns, width, memory,
                                  stats);
      if (rows)
        quantize_tile_rows<kPass, kVector>(plan, tile, x, at + here.column, here.columns, width,
                                           stats);
      if (!columns) return;
      __syncthreads();
      if constexpr (kPass != Pass::kLargest)
        quantize_tile_columns<kVector>(plan, tile, x, at + tile.column0, tile.columns, memory,
                                       stats);
    };
    const auto rows_left = [&](int i) { return i < here.rows ? here.columns : 0; };
    Values x[kRows];
    if constexpr (kParts == 1) {
      if constexpr (Source::kCombines) {
        const auto columns = source.template columns<kVector>(here.column, here.columns);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          x[i] = source.template combine<kPass, kVector>(slots + i * kInputs * kThreads, columns,
                                                         table, here.row + i, here.column,
                                                         rows_left(i));
      } else {
#pragma unroll
        for (int i = 0; i < kRows; ++i) read_values(slots + i * kInputs * kThreads, x[i]);
      }
      if (kVector && more) fetch_inputs(0, kInputs);
      quantize(x, 0);
    } else {
      const auto columns = source.template columns<kVector>(here.column, here.columns);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        source.template combine<kPass, kVector>(slots + i * kInputs * kThreads, held[i], columns,
                                                table, here.row + i, here.column, rows_left(i));
      if constexpr (kVector && Source::kHeld != 0)
        if (more) fetch_held<kVector>(source, fetch, held);
#pragma unroll 1
      for (int p = 0; p < kParts; ++p) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) read_values(slots + (i * kInputs + p) * kThreads, x[i]);
        if (kVector && more) fetch_inputs(p, p + 1);
        quantize(x, p);
      }
    }
  }
}

template <typename Source, Pass kPass, bool kVector>
__global__ void __launch_bounds__(Source::kThreads, Source::kCtas)
    quantize_tiles(const Source source, const TilePlan plan) {
  extern __shared__ uint4 stage[];
  __shared__ TileMemory memory;
  ThreadStats stats;
  Walk walk = start_walk(plan);
  quantize_walk<kPass, kVector>(source, plan, walk, stage, memory, stats);
  if (kPass != Pass::kLargest && plan.stats != nullptr) flush_stats(stats, plan.stats);
}

}  // namespace lockstep::ops::cuda

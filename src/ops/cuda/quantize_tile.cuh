// Quantizing in tiles of 128 rows x 128 columns: row codes and column codes from one read. A CTA
// of 256 threads brings the values of a tile into registers, while the next one is on its way to
// shared memory, and quantizes them there (ops/cuda/quantize_tile_codes.cuh).
//
// Where a scale covers more than a tile (Scaling::kRow), the same kernel runs twice: once for the
// largest magnitudes, once for the scales and the codes.
#pragma once

#include "ops/cuda/quantize_tile_codes.cuh"

namespace lockstep::ops::cuda {

// The tiles of a CTA's walk where rows are gathered, through a ring: the first four rows of each
// thread and its last four follow each other around it.
template <Pass kPass, typename Source>
__device__ inline void quantize_ring(const Source& source, const TilePlan& plan, uint4* stage,
                                     TileMemory& memory, ThreadStats& stats) {
  const int thread = static_cast<int>(threadIdx.x);
  uint4* slots = stage + thread;
  constexpr int kHalf = 4 * kTileThreads;
  struct Half {
    const Bf16* column;  // in row 0
    int rows;
    std::int32_t gathered[4];
  };
  const auto half_of = [&](unsigned number, int half) {
    const Tile& tile = memory.walk.found[number % 4];
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
  unsigned ticket = first_ticket();
  start_walk(plan, memory.walk);
  if (thread == 0)
    for (unsigned i = 0; i < 3; ++i) find_tile<kPass>(plan, memory.walk, i, ticket);
  __syncthreads();
  fetch(half_of(0, 0), 0);
  fetch(half_of(0, 1), 1);
  fetch(half_of(1, 0), 2);
  int place = 0;
  for (unsigned number = 0;; ++number) {
    const Tile tile = memory.walk.found[number % 4];
    if (tile.rows < 0) break;
    if (thread == 0) find_tile<kPass>(plan, memory.walk, number + 3, ticket);
    const Half second = half_of(number + 1, 1), first = half_of(number + 2, 0);
    float row_inverse = 1.0f;
    if constexpr (kPass == Pass::kEncode)
      row_inverse = known_scales<1>(plan, tile, read_known<1>(plan, tile), memory, stats);
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
    quantize_part<kPass, true, 1, Source::kColumnsAlone>(plan, tile, x, 0, row_inverse, memory,
                                                         stats);
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
  unsigned ticket = first_ticket();
  start_walk(plan, memory.walk);
  if (threadIdx.x == 0) find_tile<kPass>(plan, memory.walk, 0, ticket);
  __syncthreads();
  bool more = memory.walk.found[0].rows >= 0;
  // Of held rows the first ones are fetched a tile ahead. The others, whose turn comes later, wait
  // until the last codes are done: there are no registers for them before.
  constexpr int kHeldAhead = kPass == Pass::kLargest ? 2 : 5;
  [[maybe_unused]] Bf16x8 held[8];
  const auto fetch_inputs = [&](const Fetch<Source>& fetch, int begin, int end) {
    for (int j = begin; j < end; ++j) fetch_input<kVector>(source, fetch, j, slots);
  };
  const auto fetch_all = [&](const Fetch<Source>& fetch) {
    fetch_inputs(fetch, 0, kInputs);
    if constexpr (Source::kHeld != 0)
#pragma unroll
      for (int i = 0; i < 8; ++i) held[i] = fetch_held<kVector>(source, fetch, i);
  };
  if (kVector && more) fetch_all(start_fetch(source, memory.walk.found[0]));
  constexpr bool kKnownAhead = Source::ctas(kPass) <= 2;  // more leave no registers for it
  [[maybe_unused]] KnownBits known;
  if (kPass == Pass::kEncode && kKnownAhead) known = read_known<kParts>(plan, memory.walk.found[0]);
  if (threadIdx.x == 0) find_tile<kPass>(plan, memory.walk, 1, ticket);
  if constexpr (Source::kTableBytes != 0) Source::fill_table(table);
  __syncthreads();
  for (unsigned number = 0; more; ++number) {
    const Tile tile = memory.walk.found[number % 4], &next = memory.walk.found[(number + 1) % 4];
    const Fetch<Source> here = start_fetch(source, tile), fetch = start_fetch(source, next);
    if constexpr (!kVector) fetch_all(here);
    more = next.rows >= 0;
    if (threadIdx.x == 0) find_tile<kPass>(plan, memory.walk, number + 2, ticket);
    const bool ahead = kVector && more;
    float row_inverse = 1.0f;
    if constexpr (kPass == Pass::kEncode) {
      if (!kKnownAhead) known = read_known<kParts>(plan, tile);
      row_inverse = known_scales<kParts>(plan, tile, known, memory, stats);
      if (kKnownAhead) known = read_known<kParts>(plan, next);
    }
    if constexpr (kVector) asm volatile("cp.async.wait_all;" ::: "memory");
    const auto quantize = [&](const Values(&x)[8], int part) {
      quantize_part<kPass, kVector, kParts, Source::kColumnsAlone>(plan, tile, x, part, row_inverse,
                                                                   memory, stats);
    };
    Values x[8];
    const auto rows_left = [&](int i) { return i < here.rows ? here.columns : 0; };
    if constexpr (!Source::kCombines) {
#pragma unroll
      for (int i = 0; i < 8; ++i) read_values(slots + i * kTileThreads, x[i]);
      if (ahead) fetch_inputs(fetch, 0, 1);
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
      // The first part stays in registers, the second waits in the slots of the second input.
      const Bf16* from = first_eight(source, fetch, 0);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        uint4* own = slots + i * kInputs * kTileThreads;
        Bf16x8 in[kInputs];
#pragma unroll
        for (int j = 0; j < kInputs; ++j) read_values(own + j * kTileThreads, in[j]);
        if (ahead) fetch_eight<kVector>(source, fetch, from, 0, i, own);
        from += source.stride(0);
        const auto [first, second] = source.template combine<kPass, kVector>(
            in, held[i], table, here.row + i, here.column, rows_left(i));
        x[i] = first;
        write_values(own + kTileThreads, second);
        if (i < kHeldAhead && ahead) held[i] = fetch_held<kVector>(source, fetch, i);
      }
#pragma unroll 1
      for (int p = 0; p < 2; ++p) {
        quantize(x, p);
        if (p == 1) break;
#pragma unroll
        for (int i = 0; i < 8; ++i) read_values(slots + (i * kInputs + 1) * kTileThreads, x[i]);
        if (ahead) fetch_inputs(fetch, 1, 2);
      }
      if constexpr (kVector)
#pragma unroll
        for (int i = kHeldAhead; i < 8; ++i) held[i] = fetch_held<kVector>(source, fetch, i);
    }
  }
}

template <typename Source, Pass kPass, bool kVector>
__global__ void __launch_bounds__(kTileThreads, Source::ctas(kPass))
    quantize_tiles(const Source source, const TilePlan plan) {
  // Aligned to a line of shared memory: copies that straddle two take up to a tenth longer.
  extern __shared__ __align__(128) uint4 stage[];
  __shared__ TileMemory memory;
  ThreadStats stats;
  if (kPass == Pass::kEncode && plan.column_largest != nullptr && plan.offsets != nullptr)
    scales_of_empty_segments(plan, Source::kParts * plan.K);
  if constexpr (kVector && kInRing<Source>)
    quantize_ring<kPass>(source, plan, stage, memory, stats);
  else
    quantize_walk<kPass, kVector>(source, plan, stage, memory, stats);
  if (kPass != Pass::kLargest && plan.stats != nullptr) flush_stats(stats, plan.stats);
}

}  // namespace lockstep::ops::cuda

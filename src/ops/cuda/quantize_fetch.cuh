// How a tile's inputs come into shared memory, from what kind of source.
#pragma once

#include "ops/cuda/quantize_walk.cuh"

namespace lockstep::ops::cuda {

// A source gives eight neighbouring columns of a row, of each of its parts (which lie side by side,
// K columns each, in the outputs), from kInputs eights in memory, and kHeld (0 or 1) more:
//   at(input, row, column), stride(input)   where an input lies, and its next row
//   gathered(row)                           with kGather: the row to read for it
//   ctas(pass)                              thread blocks of a multiprocessor
//   columns<kVector>(column, n)             what belongs to the columns alone, read once a tile
//   fill_table(table)                       with kTableBytes: a table that the CTA fills first
//   combine<kPass, kVector>(...)            with kCombines: turns a row's inputs into the values of
//                                           its part, or of both; it may write what belongs to them
//   kColumnsAlone                           whether column codes may be wanted without row codes
// Inputs wait in shared memory, where a thread has slots of its own, the held one in registers; the
// inputs of the next tile take them as soon as they are free. Where rows are not aligned, nothing
// is fetched ahead.
//
// Gathered rows take a ring of three halves of a tile: each row lies somewhere else, and with the
// next tile alone on its way the memory would not be busy all the time. (Rows that follow each
// other are slower that way.)
template <typename Source>
inline constexpr bool kInRing = Source::kGather;
template <typename Source>
inline constexpr int kStageBytes =
    (kInRing<Source> ? 3 : 2 * Source::kInputs) * kQuantBlock* kQuantBlock + Source::kTableBytes;

template <typename Source>
struct Fetch {
  int row, column;    // this thread's first
  int rows, columns;  // rows from its first (0 behind the last column), columns likewise
  std::int32_t gathered[Source::kGather ? 8 : 1];
};
template <typename Source>
__device__ inline Fetch<Source> start_fetch(const Source& source, const Tile& tile) {
  const int thread = static_cast<int>(threadIdx.x), first = thread / 16 * 8;
  Fetch<Source> f;
  f.row = tile.row0 + first, f.column = tile.column0 + thread % 16 * 8;
  f.columns = tile.columns - thread % 16 * 8;
  f.rows = f.columns > 0 ? tile.rows - first : 0;
  if constexpr (Source::kGather)
#pragma unroll
    for (int i = 0; i < 8; ++i) f.gathered[i] = i < f.rows ? source.gathered(f.row + i) : 0;
  return f;
}
// 16 bytes, or zeros, on their way to shared memory.
__device__ inline void copy_eight(uint4* to, const Bf16* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(there ? 16 : 0)
               : "memory");
}

// The eight at `from`, of the thread's row i, into a slot.
template <bool kVector, typename Source>
__device__ inline void fetch_eight(const Source& source, const Fetch<Source>& f, const Bf16* from,
                                   int input, int i, uint4* to) {
  if constexpr (Source::kGather) from += f.gathered[i] * source.stride(input);
  if constexpr (kVector)
    copy_eight(to, from, i < f.rows);
  else
    *to = shared8(load8<false>(from, i < f.rows ? f.columns : 0));
}
template <typename Source>
__device__ inline const Bf16* first_eight(const Source& source, const Fetch<Source>& f, int input) {
  return source.at(input, Source::kGather ? 0 : f.row, f.column);
}

// One input of the thread's rows into its slots.
template <bool kVector, typename Source>
__device__ inline void fetch_input(const Source& source, const Fetch<Source>& f, int input,
                                   uint4* slots) {
  const std::int64_t stride = source.stride(input);
  const Bf16* from = first_eight(source, f, input);
  uint4* to = slots + input * kTileThreads;
#pragma unroll
  for (int i = 0; i < 8; ++i, to += Source::kInputs * kTileThreads) {
    fetch_eight<kVector>(source, f, from, input, i, to);
    if constexpr (!Source::kGather) from += stride;
  }
}

__device__ inline void read_values(const uint4* slots, Bf16x8& x) { x = shared8(slots); }
__device__ inline void write_values(uint4* slots, const Bf16x8& x) { *slots = shared8(x); }

// The held input of the thread's row i.
template <bool kVector, typename Source>
__device__ inline Bf16x8 fetch_held(const Source& source, const Fetch<Source>& f, int i) {
  return load8<kVector>(source.at(Source::kInputs, f.row + i, f.column),
                        i < f.rows ? f.columns : 0);
}

}  // namespace lockstep::ops::cuda

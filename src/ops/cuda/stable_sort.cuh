// A stable sort of n items by a small key (a bin below E), in tiles: a histogram of each tile, then
// a scatter in which every block adds up the tiles before its own and every warp walks its own
// items in order. Integers only, so the result is the same for any grid and tile. A tile alone
// needs one launch.
//
// `Items` says what is sorted: `int key(int i)` in [0, E), and `void place(int i, int row)` is
// called once for each item with its place in the sorted order.
#pragma once

#include "ops/cuda/rows.cuh"

namespace lockstep::ops::cuda {

inline constexpr int kSortWarps = 8;
inline constexpr int kSortTile = 1024;      // at least
inline constexpr int kSortMostTiles = 128;  // more items: larger tiles

// Where the bins begin: offsets [E + 1], and the same with each bin rounded up to 128 items; both
// may be null.
struct Bins {
  int E;
  std::int32_t* offsets;
  std::int32_t* padded_offsets;
};

// The items of one warp of a tile: [begin, end), a whole number of groups of 32 but for the last.
struct SortSpan {
  int begin, end;
};

__device__ inline SortSpan warp_span(int n, int tile) {
  const int first = static_cast<int>(blockIdx.x) * tile;
  const int items = min(tile, n - first);
  const int share = (items + 32 * kSortWarps - 1) / (32 * kSortWarps) * 32;
  const int begin = first + min(items, static_cast<int>(threadIdx.x / 32) * share);
  return {begin, min(begin + share, first + items)};
}

// counts_WE[warp][bin] of this tile, in shared memory.
template <typename Items>
__device__ void count_tile(const Items& items, int n, int tile, int E, std::int32_t* counts_WE) {
  for (int i = static_cast<int>(threadIdx.x); i < kSortWarps * E; i += 32 * kSortWarps)
    counts_WE[i] = 0;
  __syncthreads();
  const SortSpan span = warp_span(n, tile);
  std::int32_t* counts = counts_WE + threadIdx.x / 32 * E;
  for (int i = span.begin + static_cast<int>(threadIdx.x % 32); i < span.end; i += 32)
    atomicAdd(counts + items.key(i), 1);
  __syncthreads();
}

// counts_WE becomes each warp's first row in each bin, where the tile's first row is first(bin).
template <typename First>
__device__ void place_warps(int E, std::int32_t* counts_WE, First first) {
  for (int e = static_cast<int>(threadIdx.x); e < E; e += 32 * kSortWarps) {
    std::int32_t row = first(e);
    for (int w = 0; w < kSortWarps; ++w) {
      const std::int32_t count = counts_WE[w * E + e];
      counts_WE[w * E + e] = row;
      row += count;
    }
  }
  __syncthreads();
}

template <typename Items>
__device__ void scatter_tile(const Items& items, int n, int tile, int E, std::int32_t* next_WE) {
  const SortSpan span = warp_span(n, tile);
  const unsigned lane = threadIdx.x % 32;
  std::int32_t* next = next_WE + threadIdx.x / 32 * E;
  for (int i0 = span.begin; i0 < span.end; i0 += 32) {
    const int i = i0 + static_cast<int>(lane);
    const bool present = i < span.end;
    const int key = present ? items.key(i) : -1;
    const unsigned same = __match_any_sync(kFullWarp, key);
    const int rank = __popc(same & ((1u << lane) - 1));
    const std::int32_t row = present ? next[key] + rank : 0;
    __syncwarp();
    if (present && rank == 0) next[key] = row + __popc(same);
    __syncwarp();
    if (present) items.place(i, row);
  }
}

__device__ inline int warp_scan(int value) {  // inclusive
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int below = __shfl_up_sync(kFullWarp, value, d);
    if (static_cast<int>(threadIdx.x % 32) >= d) value += below;
  }
  return value;
}

// By one warp of every block: totals_E (shared memory) become the bins' first rows; the first block
// writes the offsets.
__device__ inline void scan_bins(const Bins& bins, std::int32_t* totals_E) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const bool writes = blockIdx.x == 0 && bins.offsets != nullptr;
  int rows = 0, padded_rows = 0;
  for (int e0 = 0; e0 < bins.E; e0 += 32) {
    const int e = e0 + lane;
    const int count = e < bins.E ? totals_E[e] : 0, padded = (count + 127) / 128 * 128;
    const int end = rows + warp_scan(count), padded_end = padded_rows + warp_scan(padded);
    if (e < bins.E) {
      totals_E[e] = end - count;
      if (writes) bins.offsets[e + 1] = end;
      if (writes) bins.padded_offsets[e + 1] = padded_end;
    }
    rows = __shfl_sync(kFullWarp, end, 31);
    padded_rows = __shfl_sync(kFullWarp, padded_end, 31);
  }
  if (writes && lane == 0) bins.offsets[0] = bins.padded_offsets[0] = 0;
}

// counts_TE [tiles][E].
template <typename Items>
__global__ void __launch_bounds__(32 * kSortWarps)
    sort_count_kernel(Items items, int n, int tile, int E, std::int32_t* counts_TE) {
  extern __shared__ std::int32_t counts_WE[];
  count_tile(items, n, tile, E, counts_WE);
  for (int e = static_cast<int>(threadIdx.x); e < E; e += 32 * kSortWarps) {
    int total = 0;
    for (int w = 0; w < kSortWarps; ++w) total += counts_WE[w * E + e];
    counts_TE[static_cast<std::int64_t>(blockIdx.x) * E + e] = total;
  }
}

// Shared memory: [warps + 2][E]. counts_TE is null where there is one tile.
template <typename Items>
__global__ void __launch_bounds__(32 * kSortWarps)
    sort_scatter_kernel(Items items, int n, int tile, Bins bins, const std::int32_t* counts_TE) {
  extern __shared__ std::int32_t counts_WE[];
  const int E = bins.E;
  std::int32_t* totals = counts_WE + kSortWarps * E;  // then the bins' first rows
  std::int32_t* before = totals + E;                  // items of a bin in the tiles before this one
  count_tile(items, n, tile, E, counts_WE);
  for (int e = static_cast<int>(threadIdx.x); e < E; e += 32 * kSortWarps) {
    int total = 0, mine = 0;
    if (counts_TE == nullptr) {
      for (int w = 0; w < kSortWarps; ++w) total += counts_WE[w * E + e];
    } else {
#pragma unroll 16
      for (int i = 0; i < static_cast<int>(gridDim.x); ++i) {
        const int count = __ldg(counts_TE + static_cast<std::int64_t>(i) * E + e);
        total += count;
        mine += i < static_cast<int>(blockIdx.x) ? count : 0;
      }
    }
    totals[e] = total;
    before[e] = mine;
  }
  __syncthreads();
  if (threadIdx.x < 32) scan_bins(bins, totals);
  __syncthreads();
  place_warps(E, counts_WE, [&](int e) { return totals[e] + before[e]; });
  scatter_tile(items, n, tile, E, counts_WE);
}

// E at most 1024, n below 2^31. Scratch from the context's workspace, in the caller's scope.
template <typename Items>
void stable_sort(const tensor::Context& ctx, const Items& items, std::int64_t n, const Bins& bins) {
  const cudaStream_t stream = stream_of(ctx);
  const int count = static_cast<int>(n), threads = 32 * kSortWarps;
  const std::size_t shared = sizeof(std::int32_t) * (kSortWarps + 2) * bins.E;
  const int share = (count + kSortMostTiles - 1) / kSortMostTiles;
  const int tile = std::max(kSortTile, (share + threads - 1) / threads * threads);
  const int tiles = std::max(1, (count + tile - 1) / tile);
  std::int32_t* counts_TE = nullptr;
  if (tiles > 1) {
    counts_TE =
        ctx.workspace->take(tensor::DType::kInt32, {tiles, bins.E}).template as<std::int32_t>();
    sort_count_kernel<<<tiles, threads, shared, stream>>>(items, count, tile, bins.E, counts_TE);
    LOCKSTEP_CUDA_LAUNCHED("sort: count");
  }
  sort_scatter_kernel<<<tiles, threads, shared, stream>>>(items, count, tile, bins, counts_TE);
  LOCKSTEP_CUDA_LAUNCHED("sort: scatter");
}

}  // namespace lockstep::ops::cuda

// A stable sort of n items by a small key (a bin below E), in tiles of kSortTile items: a histogram
// of each tile, a scan over tiles and bins, and a scatter in which every warp walks its own items
// in order. Integers only, so the result is the same for any grid. A tile alone needs one launch.
//
// `Items` says what is sorted: `int key(int i)` in [0, E), and `void place(int i, int row)` is
// called once for each item with its place in the sorted order.
#pragma once

#include "ops/cuda/rows.cuh"

namespace lockstep::ops::cuda {

inline constexpr int kSortWarps = 8;
inline constexpr int kSortTile = 4096;

// Where the bins begin: offsets [E + 1], and the same with each bin rounded up to 128 items. Either
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

__device__ inline SortSpan warp_span(int n) {
  const int first = static_cast<int>(blockIdx.x) * kSortTile;
  const int items = min(kSortTile, n - first);
  const int share = (items + 32 * kSortWarps - 1) / (32 * kSortWarps) * 32;
  const int begin = first + min(items, static_cast<int>(threadIdx.x / 32) * share);
  return {begin, min(begin + share, first + items)};
}

// counts_WE[warp][bin] of this tile, in shared memory.
template <typename Items>
__device__ void count_tile(const Items& items, int n, int E, std::int32_t* counts_WE) {
  for (int i = static_cast<int>(threadIdx.x); i < kSortWarps * E; i += 32 * kSortWarps)
    counts_WE[i] = 0;
  __syncthreads();
  const SortSpan span = warp_span(n);
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
__device__ void scatter_tile(const Items& items, int n, int E, std::int32_t* next_WE) {
  const SortSpan span = warp_span(n);
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

// By one warp: totals_E (shared memory) become the bins' first rows; bins.offsets are written.
__device__ inline void scan_bins(const Bins& bins, std::int32_t* totals_E) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int rows = 0, padded_rows = 0;
  for (int e0 = 0; e0 < bins.E; e0 += 32) {
    const int e = e0 + lane;
    const int count = e < bins.E ? totals_E[e] : 0, padded = (count + 127) / 128 * 128;
    const int end = rows + warp_scan(count), padded_end = padded_rows + warp_scan(padded);
    if (e < bins.E) {
      totals_E[e] = end - count;
      if (bins.offsets != nullptr) bins.offsets[e + 1] = end;
      if (bins.padded_offsets != nullptr) bins.padded_offsets[e + 1] = padded_end;
    }
    rows = __shfl_sync(kFullWarp, end, 31);
    padded_rows = __shfl_sync(kFullWarp, padded_end, 31);
  }
  if (lane == 0 && bins.offsets != nullptr) bins.offsets[0] = 0;
  if (lane == 0 && bins.padded_offsets != nullptr) bins.padded_offsets[0] = 0;
}

// All in one block, n <= kSortTile. Shared memory: [warps + 1][E].
template <typename Items>
__global__ void __launch_bounds__(32 * kSortWarps) sort_tile_kernel(Items items, int n, Bins bins) {
  extern __shared__ std::int32_t counts_WE[];
  std::int32_t* totals = counts_WE + kSortWarps * bins.E;
  count_tile(items, n, bins.E, counts_WE);
  for (int e = static_cast<int>(threadIdx.x); e < bins.E; e += 32 * kSortWarps) {
    int total = 0;
    for (int w = 0; w < kSortWarps; ++w) total += counts_WE[w * bins.E + e];
    totals[e] = total;
  }
  __syncthreads();
  if (threadIdx.x < 32) scan_bins(bins, totals);
  __syncthreads();
  place_warps(bins.E, counts_WE, [&](int e) { return totals[e]; });
  scatter_tile(items, n, bins.E, counts_WE);
}

// tile_counts [E][tiles].
template <typename Items>
__global__ void __launch_bounds__(32 * kSortWarps)
    sort_count_kernel(Items items, int n, int E, std::int32_t* tile_counts) {
  extern __shared__ std::int32_t counts_WE[];
  count_tile(items, n, E, counts_WE);
  for (int e = static_cast<int>(threadIdx.x); e < E; e += 32 * kSortWarps) {
    int total = 0;
    for (int w = 0; w < kSortWarps; ++w) total += counts_WE[w * E + e];
    tile_counts[static_cast<std::int64_t>(e) * gridDim.x + blockIdx.x] = total;
  }
}

// One block: tile_counts become each tile's first row within its bin, first_E [E] the bins' rows.
void sort_scan(std::int32_t* tile_counts, int tiles, const Bins& bins, std::int32_t* first_E,
               cudaStream_t stream);

template <typename Items>
__global__ void __launch_bounds__(32 * kSortWarps)
    sort_scatter_kernel(Items items, int n, int E, const std::int32_t* tile_rows,
                        const std::int32_t* first_E) {
  extern __shared__ std::int32_t counts_WE[];
  count_tile(items, n, E, counts_WE);
  place_warps(E, counts_WE, [&](int e) {
    return first_E[e] + tile_rows[static_cast<std::int64_t>(e) * gridDim.x + blockIdx.x];
  });
  scatter_tile(items, n, E, counts_WE);
}

// E at most 1024, n below 2^31. Scratch from the context's workspace, in the caller's scope.
template <typename Items>
void stable_sort(const tensor::Context& ctx, const Items& items, std::int64_t n, const Bins& bins) {
  const cudaStream_t stream = stream_of(ctx);
  const int count = static_cast<int>(n), threads = 32 * kSortWarps;
  const std::size_t shared = sizeof(std::int32_t) * kSortWarps * bins.E;
  if (n <= kSortTile) {
    sort_tile_kernel<<<1, threads, shared + sizeof(std::int32_t) * bins.E, stream>>>(items, count,
                                                                                     bins);
    LOCKSTEP_CUDA_LAUNCHED("sort of a tile");
    return;
  }
  const int tiles = static_cast<int>((n + kSortTile - 1) / kSortTile);
  auto* tile_counts =
      ctx.workspace->take(tensor::DType::kInt32, {bins.E, tiles}).template as<std::int32_t>();
  auto* first_E = ctx.workspace->take(tensor::DType::kInt32, {bins.E}).template as<std::int32_t>();
  sort_count_kernel<<<tiles, threads, shared, stream>>>(items, count, bins.E, tile_counts);
  LOCKSTEP_CUDA_LAUNCHED("sort: count");
  sort_scan(tile_counts, tiles, bins, first_E, stream);
  sort_scatter_kernel<<<tiles, threads, shared, stream>>>(items, count, bins.E, tile_counts,
                                                          first_E);
  LOCKSTEP_CUDA_LAUNCHED("sort: scatter");
}

}  // namespace lockstep::ops::cuda

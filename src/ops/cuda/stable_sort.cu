#include "ops/cuda/stable_sort.cuh"

namespace lockstep::ops::cuda {
namespace {

constexpr int kScanWarps = 32;
constexpr int kTilesPerLane = 8;  // in flight

// A warp a bin: the scan over its tiles; then one warp the scan over bins.
__global__ void __launch_bounds__(32 * kScanWarps)
    sort_scan_kernel(std::int32_t* tile_counts, int tiles, Bins bins, std::int32_t* first_E) {
  extern __shared__ std::int32_t totals[];
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int e = static_cast<int>(threadIdx.x / 32); e < bins.E; e += kScanWarps) {
    std::int32_t* counts = tile_counts + static_cast<std::int64_t>(e) * tiles;
    int total = 0;
    for (int i0 = 0; i0 < tiles; i0 += 32 * kTilesPerLane) {
      int count[kTilesPerLane];
#pragma unroll
      for (int k = 0; k < kTilesPerLane; ++k) {
        const int i = i0 + 32 * k + lane;
        count[k] = i < tiles ? counts[i] : 0;
      }
#pragma unroll
      for (int k = 0; k < kTilesPerLane; ++k) {
        const int i = i0 + 32 * k + lane;
        const int end = total + warp_scan(count[k]);
        if (i < tiles) counts[i] = end - count[k];
        total = __shfl_sync(kFullWarp, end, 31);
      }
    }
    if (lane == 0) totals[e] = total;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  scan_bins(bins, totals);
  __syncwarp();
  for (int e = lane; e < bins.E; e += 32) first_E[e] = totals[e];
}

}  // namespace

void sort_scan(std::int32_t* tile_counts, int tiles, const Bins& bins, std::int32_t* first_E,
               cudaStream_t stream) {
  const std::size_t shared = sizeof(std::int32_t) * static_cast<std::size_t>(bins.E);
  sort_scan_kernel<<<1, 32 * kScanWarps, shared, stream>>>(tile_counts, tiles, bins, first_E);
  LOCKSTEP_CUDA_LAUNCHED("sort: scan");
}

}  // namespace lockstep::ops::cuda

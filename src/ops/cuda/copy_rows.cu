#include "ops/cuda/copy_rows.cuh"
#include "ops/cuda/permute.h"

namespace lockstep::ops::cuda {
namespace {

constexpr int kInFlight = 2;  // chunks a lane
constexpr int kWarps = 4;

struct CopyRows {
  const Bf16* from;
  Bf16* to;
  const std::int32_t* index;
  std::int64_t R, T, D;
  bool scatter;
};

// A warp (blockIdx.x and y: row, part of the row) moves up to 32 * kInFlight chunks of a row.
__global__ void __launch_bounds__(32 * kWarps) copy_chunks_kernel(CopyRows a) {
  const std::int64_t r = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (r >= a.R) return;
  const std::int64_t t = clamp_index(__ldg(a.index + r), a.T), chunks = a.D / 8;
  const auto* from = reinterpret_cast<const uint4*>(a.from) + (a.scatter ? r : t) * chunks;
  auto* to = reinterpret_cast<uint4*>(a.to) + (a.scatter ? t : r) * chunks;
  const std::int64_t first = std::int64_t{blockIdx.y} * (32 * kInFlight) + threadIdx.x % 32;
  uint4 chunk[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i)
    if (first + 32 * i < chunks) chunk[i] = __ldg(from + first + 32 * i);
#pragma unroll
  for (int i = 0; i < kInFlight; ++i)
    if (first + 32 * i < chunks) to[first + 32 * i] = chunk[i];
}

__global__ void copy_values_kernel(CopyRows a) {
  const std::int64_t r = blockIdx.x, t = clamp_index(a.index[r], a.T);
  const Bf16* from = a.from + (a.scatter ? r : t) * a.D;
  Bf16* to = a.to + (a.scatter ? t : r) * a.D;
  for (std::int64_t d = threadIdx.x; d < a.D; d += blockDim.x) to[d] = from[d];
}

void launch_copy(const Context& ctx, const CopyRows& a) {
  if (a.R == 0 || a.D == 0) return;
  const cudaStream_t stream = stream_of(ctx);
  if (in_chunks(a.D, a.from, a.to)) {
    const dim3 grid(blocks_for(a.R, kWarps), blocks_for(a.D, 8 * 32 * kInFlight));
    copy_chunks_kernel<<<grid, 32 * kWarps, 0, stream>>>(a);
  } else {
    copy_values_kernel<<<static_cast<unsigned>(a.R), 128, 0, stream>>>(a);
  }
  LOCKSTEP_CUDA_LAUNCHED("a copy of rows");
}

}  // namespace

void gather_rows(const Context& ctx, const TensorView& from_TD, const TensorView& index_R,
                 const TensorView& out_RD) {
  launch_copy(ctx, {from_TD.as<Bf16>(), out_RD.as<Bf16>(), index_R.as<std::int32_t>(),
                    index_R.dim(0), from_TD.dim(0), from_TD.dim(1), false});
}

void scatter_rows(const Context& ctx, const TensorView& from_RD, const TensorView& index_R,
                  const TensorView& to_TD) {
  launch_copy(ctx, {from_RD.as<Bf16>(), to_TD.as<Bf16>(), index_R.as<std::int32_t>(),
                    index_R.dim(0), to_TD.dim(0), to_TD.dim(1), true});
}

}  // namespace lockstep::ops::cuda

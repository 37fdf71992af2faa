// Quantizing aligned rows that stay in registers from the load to the codes: four eights of columns
// a lane, so that a warp has 1,024 columns and wider rows take several warps side by side. Where a
// lane's values are added, the order is that of lane_sum (docs/numerics.md, section 3): eights l,
// l + 32, l + 64 .. on lane l, from warp to warp.
#pragma once

#include "ops/cuda/quantize_launch.cuh"

namespace lockstep::ops::cuda {

inline constexpr int kLaneEights = 4;
inline constexpr int kWarpEights = 32 * kLaneEights;
inline constexpr int kMostRowWarps = 16;
inline constexpr int kOneWarpRows = 4;  // of a CTA where a warp is enough for a row

struct LaneRows {
  std::int64_t M = 0, K = 0;
  Fp8* codes = nullptr;
  float* scales = nullptr;
  bool pow2 = false;
  QuantStats* stats = nullptr;
};

// This lane's eights of a row: first, first + 32 ..; those from `end` on are behind the row.
struct LanePart {
  int first, end;
  __device__ bool has(int i) const { return first + 32 * i < end; }
};

// What the warps of a row exchange. Two of each, taken in turn, so that a row's first write needs
// no barrier behind the last read of the row before.
struct RowMemory {
  float sum[2][32];
  std::uint32_t largest[2][kMostRowWarps];
};

// add(acc): acc with this lane's values added. The same bits on every thread of the row.
template <bool kOneWarp, typename Add>
__device__ inline float row_lane_sum(RowMemory& memory, int turn, Add add) {
  if constexpr (kOneWarp) return butterfly_sum(add(0.0f));
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  float* sum = memory.sum[turn] + lane;
#pragma unroll 1
  for (int w = 0; w < warps; ++w) {
    if (warp == w) *sum = add(w == 0 ? 0.0f : *sum);
    __syncthreads();
  }
  return butterfly_sum(*sum);
}

// Largest magnitudes m of a lane's four eights. Lane l gets that of its half warp's block in eight
// (l % 16) / 4.
__device__ inline std::uint32_t lane_block_largest(const std::uint32_t (&m)[kLaneEights]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool upper = (lane & 8) != 0, second = (lane & 4) != 0;
  const std::uint32_t a = partner_max(upper ? m[2] : m[0], upper ? m[0] : m[2], 8);
  const std::uint32_t b = partner_max(upper ? m[3] : m[1], upper ? m[1] : m[3], 8);
  std::uint32_t r = partner_max(second ? b : a, second ? a : b, 4);
  r = partner_max(r, r, 2);
  return partner_max(r, r, 1);
}

// A source of rows: values<kOneWarp>(row, part, memory, turn, x) gives the lane's values, zeros
// behind the row's end. kBlocks: a scale for 128 columns, or else for the row.
template <typename Source, bool kBlocks, bool kOneWarp>
__global__ void __launch_bounds__(kOneWarp ? 32 * kOneWarpRows : 32 * kMostRowWarps,
                                  kOneWarp ? 8 : 2)
    quantize_lane_rows(const Source source, const LaneRows out) {
  __shared__ RowMemory memory;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const LanePart part{kOneWarp ? lane : warp * kWarpEights + lane, static_cast<int>(out.K / 8)};
  const std::int64_t step = std::int64_t{gridDim.x} * (kOneWarp ? kOneWarpRows : 1);
  ThreadStats stats;
  int turn = 0;
  for (std::int64_t row = std::int64_t{blockIdx.x} * (kOneWarp ? kOneWarpRows : 1) +
                          (kOneWarp ? warp : 0);
       row < out.M; row += step, turn ^= 1) {
    typename Source::Values x[kLaneEights];
    source.template values<kOneWarp>(row, part, memory, turn, x);
    std::uint32_t m[kLaneEights];
#pragma unroll
    for (int i = 0; i < kLaneEights; ++i) m[i] = largest(x[i]);
    float inverse;
    if constexpr (kBlocks) {
      const std::uint32_t amax = lane_block_largest(m);
      const float s = scale_of(amax, out.pow2);
      inverse = 1.0f / s;
      const int block = (part.first + lane % 16 / 4 * 32) / 16;
      if (lane % 4 == 0 && block * 16 < part.end) {
        out.scales[block * out.M + row] = s;
        if (out.stats != nullptr) stats.count_block(amax);
      }
    } else {
      std::uint32_t amax = __reduce_max_sync(kAllLanes, max(max(m[0], m[1]), max(m[2], m[3])));
      if constexpr (!kOneWarp) {
        if (lane == 0) memory.largest[turn][warp] = amax;
        __syncthreads();
        for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w)
          amax = max(amax, memory.largest[turn][w]);
      }
      const float s = scale_of(amax, out.pow2);
      inverse = 1.0f / s;
      if (part.first == 0) {
        out.scales[row] = s;
        if (out.stats != nullptr) stats.count_block(amax);
      }
    }
#pragma unroll
    for (int i = 0; i < kLaneEights; ++i) {
      const float inv =
          kBlocks ? __shfl_sync(kAllLanes, inverse, (lane & 16) + 4 * i) : inverse;
      if (!part.has(i)) continue;
      const uint2 codes = encode8(x[i], inv);
      store_codes<true>(out.codes + row * out.K + (part.first + 32 * i) * 8, codes, 8);
      if (out.stats == nullptr) continue;
      stats.values += 8;
      stats.flushed += flushed(x[i], codes);
    }
  }
  if (out.stats != nullptr) flush_stats(stats, out.stats);
}

// False where rows are empty or too wide. K % 8 == 0 and every row 16-byte aligned.
template <typename Source>
bool launch_lane_rows(const Context& ctx, const Source& source, const LaneRows& out, bool blocks) {
  const std::int64_t warps = (out.K / 8 + kWarpEights - 1) / kWarpEights;
  if (warps == 0 || warps > kMostRowWarps) return false;
  if (out.M == 0) return true;
  const bool one = warps == 1;
  const auto kernel = one ? (blocks ? quantize_lane_rows<Source, true, true>
                                    : quantize_lane_rows<Source, false, true>)
                          : (blocks ? quantize_lane_rows<Source, true, false>
                                    : quantize_lane_rows<Source, false, false>);
  const std::int64_t threads = 32 * (one ? kOneWarpRows : warps);
  const std::int64_t ctas = one ? (out.M + kOneWarpRows - 1) / kOneWarpRows : out.M;
  const std::int64_t most = kMultiprocessors * std::min<std::int64_t>(32, 2048 / threads);
  kernel<<<static_cast<unsigned>(std::min(ctas, most)), static_cast<unsigned>(threads), 0,
           stream_of(ctx)>>>(source, out);
  LOCKSTEP_CUDA_LAUNCHED("quantize_lane_rows");
  return true;
}

// The eights of one row, zeros behind its end.
__device__ inline void load_lane_eights(const Bf16* row, const LanePart& part,
                                        Bf16x8 (&x)[kLaneEights]) {
#pragma unroll
  for (int i = 0; i < kLaneEights; ++i)
    x[i] = load8<true>(row + (part.first + 32 * i) * 8, part.has(i) ? 8 : 0);
}
__device__ inline void store_lane_eights(Bf16* row, const LanePart& part,
                                         const Bf16x8 (&x)[kLaneEights]) {
#pragma unroll
  for (int i = 0; i < kLaneEights; ++i)
    store8<true>(row + (part.first + 32 * i) * 8, x[i], part.has(i) ? 8 : 0);
}

}  // namespace lockstep::ops::cuda

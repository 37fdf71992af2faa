// Quantizing aligned rows that stay in registers from the load to the codes: four eights of columns
// a lane (l, l + 32, l + 64, l + 96 on lane l), so that a warp has 1,024 columns and wider rows
// take several warps side by side.
#pragma once

#include "ops/cuda/quantize_launch.cuh"

namespace lockstep::ops::cuda {

inline constexpr int kLaneEights = 4;
inline constexpr int kWarpEights = 32 * kLaneEights;
inline constexpr int kLaneWarps = 16;  // of a CTA
inline constexpr int kLaneCtas = 2;    // of a multiprocessor

struct LaneRows {
  std::int64_t M = 0, K = 0;
  Fp8* codes = nullptr;
  float* scales = nullptr;
  bool pow2 = false;
  QuantStats* stats = nullptr;
  int warps = 1;  // of a row; a CTA has as many rows side by side as find room
};

// This lane's eights of a row: first, first + 32 ..; those from `end` on are behind the row.
struct LanePart {
  int first, end;
  __device__ bool has(int i) const { return first + 32 * i < end; }
};

// What the warps of a row exchange. Two of each, taken in turn, so that a row's first write needs
// no barrier behind the last read of the row before.
struct RowMemory {
  std::uint32_t largest[2][kLaneWarps];
};

// The warps of a row. kAlone: no other row with several warps is in the CTA (barriers with numbers
// would take all sixteen, of which a multiprocessor has four times as many).
template <bool kAlone>
struct RowTeam {
  RowMemory& memory;
  int warps, warp, barrier, turn;

  __device__ void sync() const {
    if constexpr (kAlone)
      __syncthreads();
    else
      asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(32 * warps) : "memory");
  }
  __device__ std::uint32_t largest(std::uint32_t m) const {
    m = __reduce_max_sync(kAllLanes, m);
    if (warps == 1) return m;
    if (threadIdx.x % 32 == 0) memory.largest[turn][warp] = m;
    sync();
    for (int w = 0; w < warps; ++w) m = max(m, memory.largest[turn][w]);
    return m;
  }
};

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

// The scales and codes of a row's values. kBlocks: a scale for 128 columns, or else for the row.
template <bool kBlocks, typename Values, typename Team>
__device__ inline void quantize_lane_row(const LaneRows& out, std::int64_t row,
                                         const LanePart& part, const Team& team,
                                         const Values (&x)[kLaneEights], ThreadStats& stats) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
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
    const std::uint32_t amax = team.largest(max(max(m[0], m[1]), max(m[2], m[3])));
    const float s = scale_of(amax, out.pow2);
    inverse = 1.0f / s;
    if (part.first == 0) {
      out.scales[row] = s;
      if (out.stats != nullptr) stats.count_block(amax);
    }
  }
  Fp8* to = out.codes + row * out.K + part.first * 8;
#pragma unroll
  for (int i = 0; i < kLaneEights; ++i) {
    const float inv = kBlocks ? __shfl_sync(kAllLanes, inverse, (lane & 16) + 4 * i) : inverse;
    if (!part.has(i)) continue;
    const uint2 codes = encode8(x[i], inv);
    store_codes<true>(to + 32 * i * 8, codes, 8);
    if (out.stats == nullptr) continue;
    stats.values += 8;
    stats.flushed += flushed(x[i], codes);
  }
}

// A source of rows: values(row, part, team, table, x) gives the lane's values, zeros behind the
// row's end.
template <typename Source, bool kBlocks>
__global__ void __launch_bounds__(32 * kLaneWarps, kLaneCtas)
    quantize_lane_rows(const Source source, const LaneRows out) {
  // Without a table a CTA has one row, or rows of one warp.
  constexpr int kTeams = Source::kTableBytes != 0 ? kLaneWarps / 2 : 1;
  __shared__ RowMemory memory[kTeams];
  __shared__ float table[Source::kTableBytes != 0 ? Source::kTableBytes / 4 : 1];
  if constexpr (Source::kTableBytes != 0) {
    Source::fill_table(table);
    __syncthreads();
  }
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int rows = static_cast<int>(blockDim.x) / 32 / out.warps, own = warp / out.warps;
  // Barrier 0 is that of all threads.
  RowTeam<kTeams == 1> team{memory[own % kTeams], out.warps, warp % out.warps, 1 + own, 0};
  const LanePart part{team.warp * kWarpEights + lane, static_cast<int>(out.K / 8)};
  ThreadStats stats;
  for (std::int64_t row = std::int64_t{blockIdx.x} * rows + own; row < out.M;
       row += std::int64_t{gridDim.x} * rows, team.turn ^= 1) {
    typename Source::Values x[kLaneEights];
    source.values(row, part, team, table, x);
    if (out.codes == nullptr) continue;  // never; without this line more registers spill
    quantize_lane_row<kBlocks>(out, row, part, team, x, stats);
  }
  if (out.stats != nullptr) flush_stats(stats, out.stats);
}

// False where rows are empty or too wide. K % 8 == 0 and every row 16-byte aligned.
template <typename Source>
bool launch_lane_rows(const Context& ctx, const Source& source, LaneRows out, bool blocks) {
  const std::int64_t warps = (out.K / 8 + kWarpEights - 1) / kWarpEights;
  if (warps == 0 || warps > kLaneWarps) return false;
  if (out.M == 0) return true;
  out.warps = static_cast<int>(warps);
  // Many rows share a table; otherwise small CTAs, which wait for each other less.
  const std::int64_t rows = Source::kTableBytes != 0 ? kLaneWarps / warps : warps == 1 ? 4 : 1;
  const std::int64_t room = kLaneCtas * kLaneWarps / (warps * rows) * kMultiprocessors;
  // Several turns, so that the last CTAs end together, where a CTA's end costs nothing.
  const std::int64_t turns = Source::kTableBytes != 0 || out.stats != nullptr ? 1 : 8;
  const auto grid = static_cast<unsigned>(std::min((out.M + rows - 1) / rows, turns * room));
  const auto kernel = blocks ? quantize_lane_rows<Source, true> : quantize_lane_rows<Source, false>;
  kernel<<<grid, static_cast<unsigned>(32 * warps * rows), 0, stream_of(ctx)>>>(source, out);
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

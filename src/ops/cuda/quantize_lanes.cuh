// Quantizing aligned rows that stay in registers from the load to the codes: four eights of columns
// a lane (l, l + 32, l + 64, l + 96 on lane l), so that a warp has 1,024 columns and wider rows
// take several warps side by side.
#pragma once

#include <type_traits>

#include "ops/cuda/quantize_maxima.cuh"

namespace lockstep::ops::cuda {

inline constexpr int kMostLaneWarps = 16;  // of a row
inline constexpr int kLaneCtas = 2;        // of a multiprocessor

struct LaneRows {
  std::int64_t M = 0, K = 0;
  Fp8* codes = nullptr;
  float* scales = nullptr;
  bool pow2 = false;
  QuantStats* stats = nullptr;
  int warps = 1;  // of a row; a CTA has as many rows side by side as find room
};

// What the warps of a row exchange. Two of each, taken in turn, so that a row's first write needs
// no barrier behind the last read of the row before.
struct RowMemory {
  std::uint32_t largest[2][kMostLaneWarps];
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
// row's end; kLaneWarps is how many warps a CTA has at most (kMostLaneWarps, or fewer where a lane
// needs more registers). kColumns: the columns' largest magnitudes, too; then a team has
// neighbouring rows, which are of few segments, or else each of them would be merged with the
// others row by row.
template <typename Source, bool kBlocks, bool kColumns>
__global__ void __launch_bounds__(32 * Source::kLaneWarps, kLaneCtas)
    quantize_lane_rows(const Source source, const LaneRows out, const LargestColumns columns) {
  extern __shared__ __align__(128) uint4 shared[];
  // Without a table a CTA has one row, or rows of one warp.
  constexpr int kTeams = Source::kTableBytes != 0 ? Source::kLaneWarps / 2 : 1;
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
  const std::int64_t teams = std::int64_t{gridDim.x} * rows;
  const std::int64_t mine = std::int64_t{blockIdx.x} * rows + own;
  const std::int64_t run = kColumns ? (out.M + teams - 1) / teams : 1;
  const std::int64_t end = kColumns ? min(out.M, (mine + 1) * run) : out.M;
  [[maybe_unused]] ColumnMaxima maxima{{shared + warp * kWarpEights + lane}, 0, 0};
  ThreadStats stats;
  for (std::int64_t row = mine * run; row < end; row += kColumns ? 1 : teams, team.turn ^= 1) {
    if (kColumns && row >= maxima.end) {
      if (maxima.end != 0) maxima.flush(columns, part, out.K);
      maxima.start(columns, static_cast<int>(row));
    }
    typename Source::Values x[kLaneEights];
    source.values(row, part, team, table, x);
    if constexpr (kColumns) maxima.add(x);
    if (out.codes == nullptr) continue;  // never; without this line more registers spill
    quantize_lane_row<kBlocks>(out, row, part, team, x, stats);
  }
  if (kColumns && maxima.end != 0) maxima.flush(columns, part, out.K);
  if (out.stats != nullptr) flush_stats(stats, out.stats);
}

// False where rows are empty, too wide or too many. K % 8 == 0 and every row 16-byte aligned. A
// scale covers 128 columns (blocks) or a row; with rows of BF16 values the largest magnitudes of
// columns, too.
template <typename Source>
bool launch_lane_rows(const Context& ctx, const Source& source, LaneRows out, bool blocks,
                      const LargestColumns& columns = {}) {
  const std::int64_t warps = (out.K / 8 + kWarpEights - 1) / kWarpEights;
  if (warps == 0 || warps > Source::kLaneWarps || out.M >= 1 << 30) return false;
  if (out.M == 0) return true;
  out.warps = static_cast<int>(warps);
  const bool maxima = columns.largest != nullptr;
  // Many rows share a table; otherwise small CTAs, which wait for each other less.
  const std::int64_t rows = Source::kTableBytes != 0 ? Source::kLaneWarps / warps
                            : warps == 1             ? 4
                                                     : 1;
  const std::int64_t room = kLaneCtas * Source::kLaneWarps / (warps * rows) * kMultiprocessors;
  // Several turns, so that the last CTAs end together, where a CTA's end costs nothing.
  const std::int64_t turns = Source::kTableBytes != 0 || out.stats != nullptr || maxima ? 1 : 8;
  const auto grid = static_cast<unsigned>(std::min((out.M + rows - 1) / rows, turns * room));
  auto kernel =
      blocks ? quantize_lane_rows<Source, true, false> : quantize_lane_rows<Source, false, false>;
  if constexpr (std::is_same_v<typename Source::Values, Bf16x8>)
    if (maxima) kernel = quantize_lane_rows<Source, false, true>;
  const auto bytes = maxima ? static_cast<int>(warps * rows * kWarpEights * 16) : 0;
  if (maxima) allow_shared_memory(kernel, bytes);
  kernel<<<grid, static_cast<unsigned>(32 * warps * rows), static_cast<std::size_t>(bytes),
           stream_of(ctx)>>>(source, out, columns);
  LOCKSTEP_CUDA_LAUNCHED("quantize_lane_rows");
  return true;
}

// Row codes with a scale a row, and column codes with one for a column of a segment: the rows from
// one read, which finds the columns' largest magnitudes, too, and the columns from a second one.
// False as above. `of_columns` gives the same values in tiles.
template <typename Rows, typename Tiles>
bool quantize_whole_rows_columns(const Context& ctx, const Rows& of_rows, const Tiles& of_columns,
                                 const LaneRows& out, const Segments& segments,
                                 const Fp8Columns& columns) {
  const tensor::ArenaScope scope(*ctx.workspace);
  const LargestColumns largest{take_largest(ctx, segments.experts() * out.K),
                               segments.offsets_E1.template as<std::int32_t>()};
  if (!launch_lane_rows(ctx, of_rows, out, false, largest)) return false;
  encode_columns(ctx, of_columns, out.M, out.K, segments, out.pow2, largest.largest, columns);
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

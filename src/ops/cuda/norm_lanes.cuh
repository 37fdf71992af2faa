// RMSNorm whose rows stay in registers until their codes are written (ops/cuda/quantize_lanes.cuh),
// while the next row is on its way into shared memory. Where a whole column has one scale, the
// columns' largest magnitudes are found too.
#pragma once

#include "ops/cuda/quantize_lanes.cuh"
#include "ops/cuda/quantize_row.cuh"

namespace lockstep::ops::cuda {

inline constexpr int kNormWarps = 28;    // of a multiprocessor: four rows of 7,168
inline constexpr int kMaximaWarps = 24;  // the same where shared memory holds the columns' too
inline constexpr int kWideWarps = 4;     // rows of at least so many share a counter
inline constexpr int kSoleRows = 4;      // of a CTA, where a row is one warp's

// Rows of the norm; delta and h may be null.
struct NormRows {
  const Bf16 *x, *delta, *w;
  Bf16 *x_out, *h;
  float* rstd;
  float eps;
  std::int64_t D;

  bool aligned() const {
    return aligned16(x) && aligned16(delta) && aligned16(w) && aligned16(x_out) && aligned16(h);
  }
  __device__ bool writes_x_out() const { return delta != nullptr || x_out != x; }
  __device__ float reciprocal_rms(float sum) const {
    return 1.0f / sqrtf(sum / static_cast<float>(D) + eps);
  }
};

__device__ inline void fetch_lane_eights(const Bf16* row, const LanePart& part,
                                         const LaneSlots& to) {
#pragma unroll
  for (int i = 0; i < kLaneEights; ++i)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(&to.at(i)))),
                 "l"(row + (part.first + 32 * i) * 8), "r"(part.has(i) ? 16 : 0)
                 : "memory");
}

// The sum of a row's squares in lane_sum's order (docs/numerics.md, section 3): a lane's
// accumulator goes from warp to warp. The same bits on every thread of the row.
__device__ inline float sum_of_squares(const RowTeam<true>& team, float (&lanes)[2][32],
                                       const Bf16x8 (&x)[kLaneEights]) {
  const auto add = [&](float acc) {  // zeros behind the row's end add nothing
#pragma unroll
    for (int i = 0; i < kLaneEights; ++i)
#pragma unroll
      for (int c = 0; c < 8; ++c) acc = numerics::fma(value(x[i], c), value(x[i], c), acc);
    return acc;
  };
  if (team.warps == 1) return butterfly_sum(add(0.0f));
  float* acc = lanes[team.turn] + threadIdx.x % 32;
#pragma unroll 1
  for (int w = 0; w < team.warps; ++w) {
    if (team.warp == w) *acc = add(w == 0 ? 0.0f : *acc);
    team.sync();
  }
  return butterfly_sum(*acc);
}

// A lane's slots: x, delta, w and, where they are wanted, the columns' maxima.
constexpr int slot_arrays(bool maxima) { return maxima ? 4 : 3; }

template <bool kBlocks, bool kColumns>
__global__ void __launch_bounds__(32 * (kColumns ? kMaximaWarps : kNormWarps))
    norm_lane_rows(const NormRows norm, const LaneRows out, const LargestColumns columns,
                   unsigned* counter) {
  extern __shared__ __align__(128) uint4 shared[];
  __shared__ RowMemory memory;
  __shared__ float lanes[2][32];
  __shared__ int tickets[2][kSoleRows];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint4* slots = shared + warp * slot_arrays(kColumns) * kWarpEights + lane;
  const LaneSlots x_slots{slots}, delta_slots{slots + kWarpEights},
      w_slots{slots + 2 * kWarpEights};
  ColumnMaxima maxima{{slots + 3 * kWarpEights}, 0, 0};
  // A CTA has one row, or rows of one warp.
  const int rows = static_cast<int>(blockDim.x) / 32 / out.warps, own = warp / out.warps;
  RowTeam<true> team{memory, out.warps, warp % out.warps, 0, 0};
  const LanePart part{team.warp * kWarpEights + lane, static_cast<int>(out.K / 8)};
  const int teams = static_cast<int>(gridDim.x) * rows, end = static_cast<int>(out.M);
  // A team's first two rows are given; then a counter, where there is one, gives the lowest row
  // that is left, so that all teams end together. It is asked two rows ahead of the fetch, so each
  // team asks once and all ask once more for every row: after that the counter is at zero again.
  int row = static_cast<int>(blockIdx.x) * rows + own, next = row + teams, asked = 0;
  const auto limit = static_cast<unsigned>(teams + end - 1);
  const auto ask = [&] { asked = 2 * teams + static_cast<int>(atomicInc(counter, limit)); };
  const bool asks = counter != nullptr && part.first == 0;
  const auto fetch = [&](int r) {
    if (r >= end) return;
    const std::int64_t at = r * out.K;
    fetch_lane_eights(norm.x + at, part, x_slots);
    if (norm.delta != nullptr) fetch_lane_eights(norm.delta + at, part, delta_slots);
  };
  ThreadStats stats;
  fetch_lane_eights(norm.w, part, w_slots);
  fetch(row);
  if (asks) ask();
  for (;; team.turn ^= 1) {
    if constexpr (kColumns) {
      if (row >= maxima.end) {
        if (maxima.end != 0) maxima.flush(columns, part, out.K);
        if (row >= end) break;
        maxima.start(columns, row);
      }
    } else if (row >= end) {
      break;
    }
    if (asks) {
      tickets[team.turn][own] = asked;
      ask();
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    Bf16x8 y[kLaneEights];
#pragma unroll
    for (int i = 0; i < kLaneEights; ++i) {
      y[i] = shared8(&x_slots.at(i));
      if (norm.delta != nullptr) y[i] = add8(y[i], shared8(&delta_slots.at(i)));
    }
    fetch(next);
    const std::int64_t at = row * out.K;
    if (norm.writes_x_out()) store_lane_eights(norm.x_out + at, part, y);
    const float r = norm.reciprocal_rms(sum_of_squares(team, lanes, y));
    if (part.first == 0) norm.rstd[row] = r;
#pragma unroll
    for (int i = 0; i < kLaneEights; ++i) y[i] = normalised8(y[i], r, shared8(&w_slots.at(i)));
    if (norm.h != nullptr) store_lane_eights(norm.h + at, part, y);
    if constexpr (kColumns) maxima.add(y);
    quantize_lane_row<kBlocks>(out, row, part, team, y, stats);
    if (out.warps == 1) __syncwarp();
    row = next;
    next = counter != nullptr ? tickets[team.turn][own] : next + teams;
  }
  if (out.stats != nullptr) flush_stats(stats, out.stats);
}

// False where rows are too wide or too many. D % 8 == 0 and every row 16-byte aligned.
inline bool launch_norm_lanes(const Context& ctx, const NormRows& norm, LaneRows out, bool blocks,
                              const LargestColumns& columns) {
  const std::int64_t warps = (out.K / 8 + kWarpEights - 1) / kWarpEights;
  if (warps > kMostLaneWarps || out.M >= 1 << 30) return false;
  if (out.M == 0) return true;
  out.warps = static_cast<int>(warps);
  const bool maxima = columns.largest != nullptr;
  const std::int64_t rows = warps == 1 ? kSoleRows : 1, threads = 32 * warps * rows;
  const std::int64_t room =
      (maxima ? kMaximaWarps : kNormWarps) / (warps * rows) * kMultiprocessors;
  // Narrow rows need no counter: CTAs that take turns end together well enough.
  unsigned* counter =
      maxima || (warps >= kWideWarps && out.M > 2 * room * rows) ? ctx.tickets : nullptr;
  const std::int64_t turns = counter != nullptr ? 1 : 8;
  const std::int64_t grid = std::min((out.M + rows - 1) / rows, turns * room);
  const auto kernel = maxima   ? norm_lane_rows<false, true>
                      : blocks ? norm_lane_rows<true, false>
                               : norm_lane_rows<false, false>;
  const auto bytes = static_cast<int>(threads / 32 * slot_arrays(maxima) * kWarpEights * 16);
  allow_shared_memory(kernel, bytes);
  kernel<<<static_cast<unsigned>(grid), static_cast<unsigned>(threads),
           static_cast<std::size_t>(bytes), stream_of(ctx)>>>(norm, out, columns, counter);
  LOCKSTEP_CUDA_LAUNCHED("norm_lane_rows");
  return true;
}

}  // namespace lockstep::ops::cuda

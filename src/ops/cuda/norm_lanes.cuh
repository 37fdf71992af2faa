// RMSNorm whose rows stay in registers until their codes are written (ops/cuda/quantize_lanes.cuh),
// while the next row is on its way into shared memory. Where a whole column has one scale, the
// columns' largest magnitudes are found too.
#pragma once

#include "ops/cuda/quantize_lanes.cuh"
#include "ops/cuda/quantize_row.cuh"

namespace lockstep::ops::cuda {

inline constexpr int kNormWarps = 28;    // of a multiprocessor: four rows of 7,168
inline constexpr int kMaximaWarps = 24;  // the same where shared memory holds the columns' too
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

// Where the largest magnitudes of the columns go: largest[e * K + column], by segments that hold
// all rows. Null: not wanted.
struct LargestColumns {
  std::uint32_t* largest = nullptr;
  const std::int32_t* offsets = nullptr;
};

// Four eights of each thread in shared memory, which no other thread touches.
struct LaneSlots {
  uint4* first;
  __device__ uint4& at(int i) const { return first[i * blockDim.x + threadIdx.x]; }
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
                                       const LanePart& part, const Bf16x8 (&x)[kLaneEights]) {
  const auto add = [&](float acc) {
#pragma unroll
    for (int i = 0; i < kLaneEights; ++i)
      if (part.has(i))
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

// The largest magnitudes of a lane's columns over the rows of one segment.
struct ColumnMaxima {
  LaneSlots slots;
  int segment;
  std::int64_t end;  // of the segment's rows

  __device__ void clear() const {
#pragma unroll
    for (int i = 0; i < kLaneEights; ++i) slots.at(i) = {};
  }
  __device__ void find_segment(const LargestColumns& to, std::int64_t row) {
    while (__ldg(to.offsets + segment + 1) <= row) ++segment;
    end = __ldg(to.offsets + segment + 1);
  }
  __device__ void add(const Bf16x8 (&x)[kLaneEights]) const {
    constexpr std::uint32_t kAbs = 0x7FFF7FFFu;
#pragma unroll
    for (int i = 0; i < kLaneEights; ++i) {
      const uint4 m = slots.at(i);
      slots.at(i) = {max_u16x2(m.x, x[i].w[0] & kAbs), max_u16x2(m.y, x[i].w[1] & kAbs),
                     max_u16x2(m.z, x[i].w[2] & kAbs), max_u16x2(m.w, x[i].w[3] & kAbs)};
    }
  }
  // Lanes take neighbouring columns of their warp.
  __device__ void flush(const LargestColumns& to, const LanePart& part, std::int64_t K) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    __syncwarp();
    for (int j = 0; j < 4 * kLaneEights; ++j) {
      const int place = 8 * j + lane / 4;  // of the warp's eights
      const int eight = part.first - lane + place;
      if (eight >= part.end) continue;
      const uint4& eights = slots.first[place / 32 * blockDim.x + threadIdx.x - lane + place % 32];
      const std::uint32_t pair = reinterpret_cast<const std::uint32_t*>(&eights)[lane % 4];
      std::uint32_t* column = to.largest + segment * K + eight * 8 + lane % 4 * 2;
      atomicMax(column, pair << 16);
      atomicMax(column + 1, pair & 0xFFFF0000u);
    }
    __syncwarp();
  }
};

// Which rows a team works on: one, the next, which is being fetched, and so on. The first two are
// given; then a counter gives the lowest row that is left, so that the teams end together. It is
// asked two rows ahead.
struct RowTickets {
  unsigned* counter;  // null: no team has more than two rows
  std::int64_t first, end;
  std::int64_t pending = 0;

  __device__ void ask() { pending = counter != nullptr ? first + atomicAdd(counter, 1u) : end; }
};

template <bool kBlocks, bool kColumns>
__global__ void __launch_bounds__(32 * kNormWarps)
    norm_lane_rows(const NormRows norm, const LaneRows out, const LargestColumns columns,
                   unsigned* counter) {
  extern __shared__ uint4 shared[];
  __shared__ RowMemory memory;
  __shared__ float lanes[2][32];
  __shared__ std::int64_t tickets[2][kSoleRows];
  const unsigned slots = kLaneEights * blockDim.x;
  const LaneSlots x_slots{shared}, delta_slots{shared + slots}, w_slots{shared + 2 * slots};
  ColumnMaxima maxima{{shared + 3 * slots}, 0, 0};
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  // A CTA has one row, or rows of one warp.
  const int rows = static_cast<int>(blockDim.x) / 32 / out.warps, own = warp / out.warps;
  RowTeam<true> team{memory, out.warps, warp % out.warps, 0, 0};
  const LanePart part{team.warp * kWarpEights + lane, static_cast<int>(out.K / 8)};
  const std::int64_t teams = std::int64_t{gridDim.x} * rows;
  std::int64_t row = std::int64_t{blockIdx.x} * rows + own, next = row + teams;
  const auto fetch = [&](std::int64_t r) {
    if (r >= out.M) return;
    fetch_lane_eights(norm.x + r * out.K, part, x_slots);
    if (norm.delta != nullptr) fetch_lane_eights(norm.delta + r * out.K, part, delta_slots);
  };
  RowTickets ask{counter, 2 * teams, out.M};
  ThreadStats stats;
  fetch_lane_eights(norm.w, part, w_slots);
  fetch(row);
  if (part.first == 0) ask.ask();
  if constexpr (kColumns) {
    maxima.clear();
    if (row < out.M) maxima.find_segment(columns, row);
  }
  for (; row < out.M; row = next, next = tickets[team.turn][own], team.turn ^= 1) {
    if (part.first == 0) {
      tickets[team.turn][own] = ask.pending;
      ask.ask();
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
    const float r = norm.reciprocal_rms(sum_of_squares(team, lanes, part, y));
    if (part.first == 0) norm.rstd[row] = r;
#pragma unroll
    for (int i = 0; i < kLaneEights; ++i) y[i] = normalised8(y[i], r, shared8(&w_slots.at(i)));
    if (norm.h != nullptr) store_lane_eights(norm.h + at, part, y);
    if constexpr (kColumns) {
      if (row >= maxima.end) {
        maxima.flush(columns, part, out.K);
        maxima.clear();
        maxima.find_segment(columns, row);
      }
      maxima.add(y);
    }
    quantize_lane_row<kBlocks>(out, row, part, team, y, stats);
    if (out.warps == 1) __syncwarp();
  }
  if constexpr (kColumns)
    if (maxima.end != 0) maxima.flush(columns, part, out.K);
  if (out.stats != nullptr) flush_stats(stats, out.stats);
}

// False where rows are too wide. D % 8 == 0 and every row 16-byte aligned.
inline bool launch_norm_lanes(const Context& ctx, const NormRows& norm, LaneRows out, bool blocks,
                              const LargestColumns& columns) {
  const std::int64_t warps = (out.K / 8 + kWarpEights - 1) / kWarpEights;
  if (warps > kLaneWarps) return false;
  if (out.M == 0) return true;
  out.warps = static_cast<int>(warps);
  const bool maxima = columns.largest != nullptr;
  const std::int64_t rows = warps == 1 ? kSoleRows : 1, threads = 32 * warps * rows;
  const std::int64_t room =
      (maxima ? kMaximaWarps : kNormWarps) / (warps * rows) * kMultiprocessors;
  const std::int64_t grid = std::min((out.M + rows - 1) / rows, room);
  const auto kernel = maxima   ? norm_lane_rows<false, true>
                      : blocks ? norm_lane_rows<true, false>
                               : norm_lane_rows<false, false>;
  const auto bytes = static_cast<int>((maxima ? 4 : 3) * threads * kLaneEights * 16);
  allow_shared_memory(kernel, bytes);
  const tensor::ArenaScope scope(*ctx.workspace);
  unsigned* counter = out.M > 2 * grid * rows ? take_largest(ctx, 1) : nullptr;
  kernel<<<static_cast<unsigned>(grid), static_cast<unsigned>(threads),
           static_cast<std::size_t>(bytes), stream_of(ctx)>>>(norm, out, columns, counter);
  LOCKSTEP_CUDA_LAUNCHED("norm_lane_rows");
  return true;
}

}  // namespace lockstep::ops::cuda

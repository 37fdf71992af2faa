#include "ops/cuda/norm_quantize.h"
#include "ops/cuda/quantize_lanes.cuh"
#include "ops/cuda/quantize_row.cuh"

namespace lockstep::ops::cuda {
namespace {

// Rows of the norm; delta and h may be null.
struct NormRows {
  using Values = Bf16x8;
  static constexpr int kTableBytes = 0;
  const Bf16 *x, *delta, *w;
  Bf16 *x_out, *h;
  float* rstd;
  float eps;
  std::int64_t D;

  bool aligned() const {
    return aligned16(x) && aligned16(delta) && aligned16(w) && aligned16(x_out) && aligned16(h);
  }
  __device__ float reciprocal_rms(float sum) const {
    return 1.0f / sqrtf(sum / static_cast<float>(D) + eps);
  }

  // The normalised values; x_out, rstd and h are written on the way.
  __device__ void values(std::int64_t row, const LanePart& part, const RowTeam& team, const float*,
                         Bf16x8 (&y)[kLaneEights]) const {
    load_lane_eights(x + row * D, part, y);
    if (delta != nullptr) {
      Bf16x8 d[kLaneEights];
      load_lane_eights(delta + row * D, part, d);
#pragma unroll
      for (int i = 0; i < kLaneEights; ++i) y[i] = add8(y[i], d[i]);
    }
    if (delta != nullptr || x_out != x) store_lane_eights(x_out + row * D, part, y);
    const float r =
        reciprocal_rms(team.sum([&](float acc) { return add_squares(acc, part, y); }));
    if (part.first == 0) rstd[row] = r;
    Bf16x8 weights[kLaneEights];
    load_lane_eights(w, part, weights);
#pragma unroll
    for (int i = 0; i < kLaneEights; ++i) y[i] = normalised8(y[i], r, weights[i]);
    if (h != nullptr) store_lane_eights(h + row * D, part, y);
  }

  // Only x_out and rstd of a row, on one warp.
  __device__ void step(std::int64_t row) const {
    LanePart part{static_cast<int>(threadIdx.x) % 32, static_cast<int>(D / 8)};
    float acc = 0.0f;
    for (; part.first < part.end; part.first += kWarpEights) {
      Bf16x8 y[kLaneEights];
      load_lane_eights(x + row * D, part, y);
      if (delta != nullptr) {
        Bf16x8 d[kLaneEights];
        load_lane_eights(delta + row * D, part, d);
#pragma unroll
        for (int i = 0; i < kLaneEights; ++i) y[i] = add8(y[i], d[i]);
      }
      if (delta != nullptr || x_out != x) store_lane_eights(x_out + row * D, part, y);
      acc = add_squares(acc, part, y);
    }
    __syncwarp();
    const float r = reciprocal_rms(butterfly_sum(acc));
    if (threadIdx.x % 32 == 0) rstd[row] = r;
  }

  __device__ static float add_squares(float acc, const LanePart& part,
                                      const Bf16x8 (&y)[kLaneEights]) {
#pragma unroll
    for (int i = 0; i < kLaneEights; ++i)
      if (part.has(i))
#pragma unroll
        for (int c = 0; c < 8; ++c) acc = numerics::fma(value(y[i], c), value(y[i], c), acc);
    return acc;
  }
};

// The normalised values from x_out and rstd; written as BF16 too where h is not null.
struct NormSource {
  using Values = Bf16x8;
  static constexpr int kInputs = 1, kHeld = 0, kParts = 1, kCtas = 3, kTableBytes = 0;
  static constexpr bool kGather = false, kCombines = true;
  NormRows norm;

  bool aligned() const { return norm.aligned(); }
  __device__ const Bf16* at(int, std::int64_t r, std::int64_t column) const {
    return norm.x_out + r * norm.D + column;
  }
  __device__ std::int64_t stride(int) const { return norm.D; }
  template <bool kVector>
  __device__ Bf16x8 columns(std::int64_t column, int n) const {
    return load8<kVector>(norm.w + column, n);
  }
  template <Pass kPass, bool kVector>
  __device__ Bf16x8 combine(const uint4* slots, const Bf16x8& weights, const float*,
                            std::int64_t row, std::int64_t column, int n) const {
    if (n <= 0) return {};
    // Not by way of the L1 cache: another multiprocessor may just have written it.
    const Bf16x8 y = normalised8(shared8(slots), __ldcg(norm.rstd + row), weights);
    if (kPass != Pass::kLargest && norm.h != nullptr)
      store8<kVector>(norm.h + row * norm.D + column, y, n);
    return y;
  }
  template <Pass kPass>
  void launch_first(const Context& ctx, const TilePlan& plan, bool vector) const;
};

constexpr unsigned kStripeCtas = 8;

// A cluster takes a stripe of 128 rows: it steps them, and then quantizes their tiles, for which it
// finds x_out in the L2 cache.
template <Pass kPass>
__global__ void __cluster_dims__(kStripeCtas, 1, 1)
    __launch_bounds__(kTileThreads, NormSource::kCtas)
        norm_stripes(const NormSource source, const TilePlan plan) {
  extern __shared__ uint4 stage[];
  __shared__ TileMemory memory;
  ThreadStats stats;
  const unsigned rank = blockIdx.x % kStripeCtas;
  Walk walk = start_walk(plan);
  walk.row_step = 0, walk.column_step = kStripeCtas;
  for (unsigned stripe = blockIdx.x / kStripeCtas; stripe < plan.row_tiles;
       stripe += gridDim.x / kStripeCtas) {
    walk.row = stripe, walk.row_tiles = stripe + 1, walk.column = 0;
    Walk first = walk;
    Tile tile;
    if (!next_tile<kPass>(plan, first, tile)) break;
    constexpr int kWarps = kTileThreads / 32;
    for (int r = static_cast<int>(rank) * kWarps + static_cast<int>(threadIdx.x) / 32;
         r < tile.rows; r += static_cast<int>(kStripeCtas) * kWarps)
      source.norm.step(tile.row0 + r);
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
            : "memory");
    walk.column = rank;
    if (rank < walk.column_tiles)
      quantize_walk<kPass, true>(source, plan, walk, stage, memory, stats);
  }
  if (kPass != Pass::kLargest && plan.stats != nullptr) flush_stats(stats, plan.stats);
}

template <Pass kPass>
void NormSource::launch_first(const Context& ctx, const TilePlan& plan, bool vector) const {
  if (!vector) {
    RowPlan rows;
    rows.M = plan.M, rows.K = norm.D, rows.x = norm.x, rows.delta = norm.delta, rows.w = norm.w;
    rows.x_out = norm.x_out, rows.h = norm.h, rows.rstd = norm.rstd, rows.eps = norm.eps;
    launch_rows<true>(ctx, rows, false);
    launch_tiles<kPass>(ctx, *this, plan, false);
    return;
  }
  if (plan.row_tiles == 0 || norm.D == 0) return;
  const std::int64_t most = kMultiprocessors * kCtas / kStripeCtas;
  const auto stripes = static_cast<unsigned>(std::min(plan.row_tiles, most));
  constexpr int kStage = kStageBytes<NormSource>;
  allow_shared_memory(norm_stripes<kPass>, kStage);
  norm_stripes<kPass>
      <<<stripes * kStripeCtas, kTileThreads, kStage, stream_of(ctx)>>>(*this, plan);
  LOCKSTEP_CUDA_LAUNCHED("norm_stripes");
}

}  // namespace

void rms_norm_quantize(const Context& ctx, const TensorView& x_TD, const TensorView& delta_TD,
                       const TensorView& w_D, float eps, const TensorView& x_out_TD,
                       const TensorView& h_TD, const TensorView& rstd_T, const Segments& segments,
                       bool pow2, const Fp8Rows& rows, const Fp8Columns* columns,
                       QuantStats* stats) {
  const std::int64_t T = x_TD.dim(0), D = x_TD.dim(1);
  const NormRows norm{x_TD.as<Bf16>(),
                      delta_TD ? delta_TD.as<Bf16>() : nullptr,
                      w_D.as<Bf16>(),
                      x_out_TD.as<Bf16>(),
                      h_TD ? h_TD.as<Bf16>() : nullptr,
                      rstd_T.as<float>(),
                      eps,
                      D};
  const bool blocks = rows.scaling == Scaling::kBlock;
  if (columns == nullptr) {
    const LaneRows out{T, D, rows.codes_MK.fp8(), rows.scales.as<float>(), pow2, stats};
    if (D % 8 == 0 && norm.aligned() && aligned16(out.codes) &&
        launch_lane_rows(ctx, norm, out, blocks))
      return;
    RowPlan plan;
    plan.M = T, plan.K = D, plan.x = norm.x, plan.delta = norm.delta, plan.w = norm.w;
    plan.x_out = norm.x_out, plan.h = norm.h, plan.rstd = norm.rstd, plan.eps = eps;
    plan.codes = out.codes, plan.scales = out.scales, plan.blocks = blocks;
    plan.pow2 = pow2, plan.stats = stats;
    if (launch_rows<true>(ctx, plan, false)) return;
  }
  quantize_source(ctx, NormSource{norm}, T, D, segments, pow2, &rows, columns, stats);
}

}  // namespace lockstep::ops::cuda

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
  bool normalises;  // or else only x_out and rstd are wanted

  bool aligned() const {
    return aligned16(x) && aligned16(delta) && aligned16(w) && aligned16(x_out) && aligned16(h);
  }
  __device__ float reciprocal_rms(float sum) const {
    return 1.0f / sqrtf(sum / static_cast<float>(D) + eps);
  }

  // The normalised values, if they are wanted; x_out, rstd and h are written on the way.
  __device__ void values(std::int64_t row, const LanePart& part, const auto& team, const float*,
                         Bf16x8 (&y)[kLaneEights]) const {
    load_lane_eights(x + row * D, part, y);
    if (delta != nullptr) {
      Bf16x8 d[kLaneEights];
      load_lane_eights(delta + row * D, part, d);
#pragma unroll
      for (int i = 0; i < kLaneEights; ++i) y[i] = add8(y[i], d[i]);
    }
    if (delta != nullptr || x_out != x) store_lane_eights(x_out + row * D, part, y);
    const float r = reciprocal_rms(team.sum([&](float acc) { return add_squares(acc, part, y); }));
    if (part.first == 0) rstd[row] = r;
    if (!normalises) return;
    Bf16x8 weights[kLaneEights];
    load_lane_eights(w, part, weights);
#pragma unroll
    for (int i = 0; i < kLaneEights; ++i) y[i] = normalised8(y[i], r, weights[i]);
    if (h != nullptr) store_lane_eights(h + row * D, part, y);
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
  __device__ Bf16x8 combine(const Bf16x8 (&in)[1], const Bf16x8& weights, const float*,
                            std::int64_t row, std::int64_t column, int n) const {
    if (n <= 0) return {};
    const Bf16x8 y = normalised8(in[0], __ldg(norm.rstd + row), weights);
    if (kPass != Pass::kLargest && norm.h != nullptr)
      store8<kVector>(norm.h + row * norm.D + column, y, n);
    return y;
  }
};

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
                      D,
                      columns == nullptr};
  const bool blocks = rows.scaling == Scaling::kBlock;
  // Without columns the codes too come from the one read; with them the rows are stepped first.
  LaneRows out{T, D};
  if (columns == nullptr) out = {T, D, rows.codes_MK.fp8(), rows.scales.as<float>(), pow2, stats};
  const bool vector = D % 8 == 0 && norm.aligned() && aligned16(out.codes);
  bool done = vector && launch_lane_rows(ctx, norm, out, blocks);
  if (!done) {
    RowPlan plan;
    plan.M = T, plan.K = D, plan.x = norm.x, plan.delta = norm.delta, plan.w = norm.w;
    plan.x_out = norm.x_out, plan.h = norm.h, plan.rstd = norm.rstd, plan.eps = eps;
    plan.codes = out.codes, plan.scales = out.scales, plan.blocks = blocks;
    plan.pow2 = pow2, plan.stats = out.stats;
    done = launch_rows<true>(ctx, plan);
    plan.codes = nullptr;
    if (!done) launch_rows<true>(ctx, plan);
  }
  if (done && columns == nullptr) return;
  quantize_source(ctx, NormSource{norm}, T, D, segments, pow2, &rows, columns, stats);
}

}  // namespace lockstep::ops::cuda

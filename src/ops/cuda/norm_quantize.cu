#include "ops/cuda/norm_quantize.h"
#include "ops/cuda/quantize_lanes.cuh"
#include "ops/cuda/quantize_row.cuh"

namespace lockstep::ops::cuda {
namespace {

// The normalised values from x_out and rstd; written as BF16 too where h is not null.
struct NormSource {
  using Values = Bf16x8;
  static constexpr int kInputs = 1, kHeld = 0, kParts = 1, kCtas = 3, kTableBytes = 0;
  static constexpr bool kGather = false, kCombines = true;
  const Bf16 *x, *w;
  const float* rstd;
  Bf16* h;
  std::int64_t D;

  bool aligned() const { return aligned16(x) && aligned16(w) && aligned16(h); }
  __device__ const Bf16* at(int, std::int64_t r, std::int64_t column) const {
    return x + r * D + column;
  }
  __device__ std::int64_t stride(int) const { return D; }
  template <bool kVector>
  __device__ Bf16x8 columns(std::int64_t column, int n) const {
    return load8<kVector>(w + column, n);
  }
  template <Pass kPass, bool kVector>
  __device__ Bf16x8 combine(const uint4* slots, const Bf16x8& weights, const float*,
                            std::int64_t row, std::int64_t column, int n) const {
    if (n <= 0) return {};
    const Bf16x8 y = normalised8(shared8(slots), __ldg(rstd + row), weights);
    if (kPass != Pass::kLargest && h != nullptr) store8<kVector>(h + row * D + column, y, n);
    return y;
  }
};

// The same from x and delta, which write x_out and rstd on the way.
struct NormRows {
  using Values = Bf16x8;
  const Bf16 *x, *delta, *w;  // delta may be null
  Bf16 *x_out, *h;            // h may be null
  float* rstd;
  float eps;
  std::int64_t D;
  bool normalises;  // or else only x_out and rstd are wanted

  template <bool kOneWarp>
  __device__ void values(std::int64_t row, const LanePart& part, RowMemory& memory, int turn,
                         Bf16x8 (&y)[kLaneEights]) const {
    load_lane_eights(x + row * D, part, y);
    if (delta != nullptr) {
      Bf16x8 d[kLaneEights];
      load_lane_eights(delta + row * D, part, d);
#pragma unroll
      for (int i = 0; i < kLaneEights; ++i) y[i] = add8(y[i], d[i]);
    }
    if (delta != nullptr || x_out != x)
#pragma unroll
      for (int i = 0; i < kLaneEights; ++i)
        if (part.has(i)) store8<true>(x_out + row * D + (part.first + 32 * i) * 8, y[i], 8);
    const float sum = row_lane_sum<kOneWarp>(memory, turn, [&](float acc) {
#pragma unroll
      for (int i = 0; i < kLaneEights; ++i)
        if (part.has(i))
#pragma unroll
          for (int c = 0; c < 8; ++c) acc = numerics::fma(value(y[i], c), value(y[i], c), acc);
      return acc;
    });
    const float r = 1.0f / sqrtf(sum / static_cast<float>(D) + eps);
    if (part.first == 0) rstd[row] = r;
    if (!normalises) return;
    Bf16x8 weights[kLaneEights];
    load_lane_eights(w, part, weights);
#pragma unroll
    for (int i = 0; i < kLaneEights; ++i) {
      y[i] = normalised8(y[i], r, weights[i]);
      if (h != nullptr && part.has(i))
        store8<true>(h + row * D + (part.first + 32 * i) * 8, y[i], 8);
    }
  }
};

}  // namespace

void rms_norm_quantize(const Context& ctx, const TensorView& x_TD, const TensorView& delta_TD,
                       const TensorView& w_D, float eps, const TensorView& x_out_TD,
                       const TensorView& h_TD, const TensorView& rstd_T, const Segments& segments,
                       bool pow2, const Fp8Rows& rows, const Fp8Columns* columns,
                       QuantStats* stats) {
  const std::int64_t T = x_TD.dim(0), D = x_TD.dim(1);
  RowPlan plan;
  plan.M = T, plan.K = D, plan.x = x_TD.as<Bf16>(), plan.w = w_D.as<Bf16>(), plan.eps = eps;
  plan.delta = delta_TD ? delta_TD.as<Bf16>() : nullptr;
  plan.h = h_TD ? h_TD.as<Bf16>() : nullptr;
  plan.x_out = x_out_TD.as<Bf16>(), plan.rstd = rstd_T.as<float>();
  const bool vector = D % 8 == 0 && aligned16(plan.x) && aligned16(plan.delta) &&
                      aligned16(plan.w) && aligned16(plan.x_out) && aligned16(plan.h) &&
                      aligned16(rows.codes_MK.data);
  LaneRows lanes{T, D};
  if (columns == nullptr)
    lanes.codes = rows.codes_MK.fp8(), lanes.scales = rows.scales.as<float>(), lanes.pow2 = pow2,
    lanes.stats = stats;
  const NormRows norm{plan.x,   plan.delta, plan.w, plan.x_out,        plan.h,
                      plan.rstd, eps,        D,      columns == nullptr};
  const bool done =
      vector && launch_lane_rows(ctx, norm, lanes, rows.scaling == Scaling::kBlock);
  if (columns == nullptr) {
    if (done) return;
    RowPlan all = plan;
    all.codes = rows.codes_MK.fp8(), all.scales = rows.scales.as<float>();
    all.blocks = rows.scaling == Scaling::kBlock, all.pow2 = pow2, all.stats = stats;
    if (launch_rows<true>(ctx, all, vector)) return;
  }
  if (!done) launch_rows<true>(ctx, plan, vector);
  const NormSource source{plan.x_out, plan.w, plan.rstd, plan.h, D};
  quantize_source(ctx, source, T, D, segments, pow2, &rows, columns, stats);
}

}  // namespace lockstep::ops::cuda

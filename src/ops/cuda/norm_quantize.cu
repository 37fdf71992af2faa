#include "ops/cuda/norm_quantize.h"
#include "ops/cuda/quantize_launch.cuh"
#include "ops/cuda/quantize_row.cuh"

namespace lockstep::ops::cuda {
namespace {

// The normalised values from x_out and rstd; written as BF16 too where h is not null.
struct NormSource {
  using Values = Bf16x8;
  static constexpr int kInputs = 1, kParts = 1, kCtas = 3;
  static constexpr bool kGather = false, kCombines = true;
  static constexpr int kUnroll = 8;  // rows that are combined side by side
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
  __device__ void combine(uint4* slots, const Bf16x8& weights, std::int64_t row,
                          std::int64_t column, int n) const {
    if (n <= 0) return;  // zeros stay
    const Bf16x8 y = normalised8(shared8(slots), __ldg(rstd + row), weights);
    write_values(slots, y);
    if (kPass != Pass::kLargest && h != nullptr) store8<kVector>(h + row * D + column, y, n);
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
  if (columns == nullptr) {
    RowPlan all = plan;
    all.codes = rows.codes_MK.fp8(), all.scales = rows.scales.as<float>();
    all.blocks = rows.scaling == Scaling::kBlock, all.pow2 = pow2, all.stats = stats;
    if (launch_rows<true>(ctx, all, vector)) return;
  }
  launch_rows<true>(ctx, plan, vector);
  const NormSource source{plan.x_out, plan.w, plan.rstd, plan.h, D};
  quantize_source(ctx, source, T, D, segments, pow2, &rows, columns, stats);
}

}  // namespace lockstep::ops::cuda

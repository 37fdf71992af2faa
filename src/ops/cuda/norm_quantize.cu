#include "ops/cuda/norm_lanes.cuh"
#include "ops/cuda/norm_quantize.h"

namespace lockstep::ops::cuda {
namespace {

// The normalised values from x_out and rstd; written as BF16 too where h is not null.
struct NormSource {
  using Values = Bf16x8;
  static constexpr int kInputs = 1, kHeld = 0, kParts = 1, kTableBytes = 0;
  static constexpr int ctas(Pass) { return 3; }
  static constexpr bool kGather = false, kCombines = true, kColumnsAlone = true;
  NormRows norm;
  Bf16* h;

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
    if (kPass != Pass::kLargest && h != nullptr) store8<kVector>(h + row * norm.D + column, y, n);
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
                      D};
  const bool blocks = rows.scaling == Scaling::kBlock;
  const LaneRows out{T, D, rows.codes_MK.fp8(), rows.scales.as<float>(), pow2, stats};
  const NormSource columns_source{norm, nullptr};
  if (D % 8 == 0 && norm.aligned() && aligned16(out.codes)) {
    const tensor::ArenaScope scope(*ctx.workspace);
    LargestColumns largest;
    if (columns != nullptr && !blocks) {
      largest.largest = take_largest(ctx, segments.experts() * D);
      largest.offsets = segments.offsets_E1.as<std::int32_t>();
    }
    if (launch_norm_lanes(ctx, norm, out, blocks, largest)) {
      if (largest.largest != nullptr)
        encode_columns(ctx, columns_source, T, D, segments, pow2, largest.largest, *columns);
      else if (columns != nullptr)
        quantize_source(ctx, columns_source, T, D, segments, pow2, nullptr, columns, nullptr);
      return;
    }
  }
  RowPlan plan;
  plan.M = T, plan.K = D, plan.x = norm.x, plan.delta = norm.delta, plan.w = norm.w;
  plan.x_out = norm.x_out, plan.h = norm.h, plan.rstd = norm.rstd, plan.eps = eps;
  plan.codes = out.codes, plan.scales = out.scales, plan.blocks = blocks;
  plan.pow2 = pow2, plan.stats = stats;
  if (launch_rows<true>(ctx, plan)) {
    if (columns != nullptr)
      quantize_source(ctx, columns_source, T, D, segments, pow2, nullptr, columns, nullptr);
    return;
  }
  // Rows too wide for shared memory: x_out and rstd first.
  plan.codes = nullptr;
  launch_rows<true>(ctx, plan);
  quantize_source(ctx, NormSource{norm, norm.h}, T, D, segments, pow2, &rows, columns, stats);
}

}  // namespace lockstep::ops::cuda

#include "ops/norm_quantize.h"

#include "ops/check.h"
#include "ops/cuda/call.h"
#include "ops/cuda/norm_quantize.h"

namespace lockstep::ops {

using tensor::DType;
using tensor::require;

void rms_norm_quantize(const Context& ctx, const TensorView& x_TD, const TensorView& delta_TD,
                       const TensorView& w_D, float eps, const TensorView& x_out_TD,
                       const TensorView& h_TD, const TensorView& rstd_T, const Segments& segments,
                       bool pow2, const Fp8Rows& rows, const Fp8Columns* columns,
                       QuantStats* stats) {
  require(x_TD, DType::kBf16, {-1, -1}, "rms_norm_quantize: x");
  const std::int64_t T = x_TD.dim(0), D = x_TD.dim(1);
  LOCKSTEP_CHECK(D > 0, "rms_norm_quantize: width {}", D);
  if (delta_TD) require(delta_TD, DType::kBf16, {T, D}, "rms_norm_quantize: delta");
  require(w_D, DType::kBf16, {D}, "rms_norm_quantize: w");
  require(x_out_TD, DType::kBf16, {T, D}, "rms_norm_quantize: x_out");
  if (h_TD) require(h_TD, DType::kBf16, {T, D}, "rms_norm_quantize: h");
  require(rstd_T, DType::kFp32, {T}, "rms_norm_quantize: rstd");
  require_rows(rows, T, D, "rms_norm_quantize: rows");
  if (columns != nullptr) {
    require_columns(*columns, segments.experts(), D, "rms_norm_quantize: columns");
    require_same_scaling(rows, columns, "rms_norm_quantize");
    require_full_segments(segments, T, columns->codes_NR.dim(1));
  }
  LOCKSTEP_CUDA_CALL(ctx, rms_norm_quantize, ctx, x_TD, delta_TD, w_D, eps, x_out_TD, h_TD, rstd_T,
                     segments, pow2, rows, columns, stats);
  const tensor::ArenaScope scope(*ctx.workspace);
  const TensorView h = h_TD ? h_TD : ctx.workspace->take(DType::kBf16, {T, D});
  rms_norm(ctx, x_TD, delta_TD, w_D, eps, x_out_TD, h, rstd_T);
  quantize_rows(ctx, h, pow2, rows, stats);
  if (columns != nullptr) quantize_columns(ctx, h, segments, pow2, *columns, nullptr);
}

}  // namespace lockstep::ops

#include "ops/columns.h"

#include "ops/cpu/columns.h"
#include "ops/cuda/call.h"
#include "ops/cuda/columns.h"

namespace lockstep::ops {

using tensor::DType;
using tensor::require;

void require_pieces(const Columns& x, std::int64_t T, std::int64_t heads, std::int64_t width,
                    const char* name) {
  require(x.slab_TN, DType::kBf16, {T, -1}, name);
  const std::int64_t end = heads == 0 ? x.column : x.column + (heads - 1) * x.stride + width;
  LOCKSTEP_CHECK(x.column >= 0 && end <= x.slab_TN.dim(1), "{}: columns [{}, {}) of {}", name,
                 x.column, end, x.slab_TN.dim(1));
  LOCKSTEP_CHECK(heads <= 1 || x.stride >= width, "{}: heads of width {} lie {} columns apart",
                 name, width, x.stride);
}

void rms_norm_columns(const Context& ctx, const Columns& x, const TensorView& w_D, float eps,
                      const Columns& h, const TensorView& rstd_T) {
  require(w_D, DType::kBf16, {-1}, "rms_norm_columns: w");
  require(rstd_T, DType::kFp32, {-1}, "rms_norm_columns: rstd");
  const std::int64_t T = rstd_T.dim(0), D = w_D.dim(0);
  LOCKSTEP_CHECK(D > 0, "rms_norm_columns: width {}", D);
  require_pieces(x, T, 1, D, "rms_norm_columns: x");
  require_pieces(h, T, 1, D, "rms_norm_columns: h");
  LOCKSTEP_CUDA_CALL(ctx, rms_norm_columns, ctx, x, w_D, eps, h, rstd_T);
  LOCKSTEP_CPU_CALL(ctx, rms_norm_columns, ctx, x, w_D, eps, h, rstd_T);
}

void rms_norm_columns_backward(const Context& ctx, const Columns& d_h, const Columns& x,
                               const TensorView& w_D, const TensorView& rstd_T, const Columns& d_x,
                               const TensorView& dw_D) {
  require(w_D, DType::kBf16, {-1}, "rms_norm_columns_backward: w");
  require(rstd_T, DType::kFp32, {-1}, "rms_norm_columns_backward: rstd");
  const std::int64_t T = rstd_T.dim(0), D = w_D.dim(0);
  LOCKSTEP_CHECK(D > 0, "rms_norm_columns_backward: width {}", D);
  require_pieces(d_h, T, 1, D, "rms_norm_columns_backward: d_h");
  require_pieces(x, T, 1, D, "rms_norm_columns_backward: x");
  require_pieces(d_x, T, 1, D, "rms_norm_columns_backward: d_x");
  require(dw_D, DType::kFp32, {D}, "rms_norm_columns_backward: dw");
  LOCKSTEP_CUDA_CALL(ctx, rms_norm_columns_backward, ctx, d_h, x, w_D, rstd_T, d_x, dw_D);
  LOCKSTEP_CPU_CALL(ctx, rms_norm_columns_backward, ctx, d_h, x, w_D, rstd_T, d_x, dw_D);
}

namespace {

void require_rope(const Columns& x, std::int64_t heads, const TensorView& positions_T,
                  const TensorView& cos_PR, const TensorView& sin_PR, const Columns& out) {
  require(positions_T, DType::kInt32, {-1}, "rope_columns: positions");
  const std::int64_t T = positions_T.dim(0);
  require(cos_PR, DType::kFp32, {-1, -1}, "rope_columns: cos");
  require(sin_PR, DType::kFp32, cos_PR.shape, "rope_columns: sin");
  const std::int64_t P = cos_PR.dim(0), R = 2 * cos_PR.dim(1);
  LOCKSTEP_CHECK(heads >= 0, "rope_columns: {} heads", heads);
  require_pieces(x, T, heads, R, "rope_columns: from");
  require_pieces(out, T, heads, R, "rope_columns: to");
  LOCKSTEP_CHECK(T == 0 || P > 0, "rope_columns: the table has no positions");
  if (!positions_T.on_host()) return;
  const auto* positions = positions_T.as<std::int32_t>();
  for (std::int64_t t = 0; t < T; ++t)
    LOCKSTEP_CHECK(positions[t] >= 0 && positions[t] < P,
                   "rope_columns: token {} at position {}, the table has {}", t, positions[t], P);
}

}  // namespace

void rope_columns(const Context& ctx, const Columns& x, std::int64_t heads, RopePairs pairs,
                  const TensorView& positions_T, const TensorView& cos_PR, const TensorView& sin_PR,
                  const Columns& out) {
  require_rope(x, heads, positions_T, cos_PR, sin_PR, out);
  LOCKSTEP_CUDA_CALL(ctx, rope_columns, ctx, x, heads, pairs, positions_T, cos_PR, sin_PR, out);
  LOCKSTEP_CPU_CALL(ctx, rope_columns, ctx, x, heads, pairs, positions_T, cos_PR, sin_PR, out);
}

void rope_columns_backward(const Context& ctx, const Columns& d_out, std::int64_t heads,
                           RopePairs pairs, const TensorView& positions_T, const TensorView& cos_PR,
                           const TensorView& sin_PR, const Columns& d_x) {
  require_rope(d_out, heads, positions_T, cos_PR, sin_PR, d_x);
  LOCKSTEP_CUDA_CALL(ctx, rope_columns_backward, ctx, d_out, heads, pairs, positions_T, cos_PR,
                     sin_PR, d_x);
  LOCKSTEP_CPU_CALL(ctx, rope_columns_backward, ctx, d_out, heads, pairs, positions_T, cos_PR,
                    sin_PR, d_x);
}

}  // namespace lockstep::ops

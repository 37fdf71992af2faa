#include "ops/norm.h"

#include <cmath>
#include <vector>

#include "ops/cpu/norm.h"
#include "ops/cuda/call.h"
#include "ops/cuda/norm.h"

namespace lockstep::ops {

using tensor::DType;
using tensor::require;
using tensor::Shape;

void rms_norm(const Context& ctx, const TensorView& x_TD, const TensorView& delta_TD,
              const TensorView& w_D, float eps, const TensorView& x_out_TD, const TensorView& h_TD,
              const TensorView& rstd_T) {
  require(x_TD, DType::kBf16, {-1, -1}, "rms_norm: x");
  const std::int64_t T = x_TD.dim(0), D = x_TD.dim(1);
  LOCKSTEP_CHECK(D > 0, "rms_norm: width {}", D);
  if (delta_TD) require(delta_TD, DType::kBf16, {T, D}, "rms_norm: delta");
  require(w_D, DType::kBf16, {D}, "rms_norm: w");
  require(x_out_TD, DType::kBf16, {T, D}, "rms_norm: x_out");
  require(h_TD, DType::kBf16, {T, D}, "rms_norm: h");
  require(rstd_T, DType::kFp32, {T}, "rms_norm: rstd");
  LOCKSTEP_CUDA_CALL(ctx, rms_norm, ctx, x_TD, delta_TD, w_D, eps, x_out_TD, h_TD, rstd_T);
  LOCKSTEP_CPU_CALL(ctx, rms_norm, ctx, x_TD, delta_TD, w_D, eps, x_out_TD, h_TD, rstd_T);
}

void rms_norm_backward(const Context& ctx, const TensorView& dh_TD, const TensorView& d_residual_TD,
                       const TensorView& x_TD, const TensorView& w_D, const TensorView& rstd_T,
                       const TensorView& dx_TD, const TensorView& dw_D) {
  require(x_TD, DType::kBf16, {-1, -1}, "rms_norm_backward: x");
  const std::int64_t T = x_TD.dim(0), D = x_TD.dim(1);
  LOCKSTEP_CHECK(D > 0, "rms_norm_backward: width {}", D);
  require(dh_TD, DType::kBf16, {T, D}, "rms_norm_backward: dh");
  if (d_residual_TD) require(d_residual_TD, DType::kBf16, {T, D}, "rms_norm_backward: d_residual");
  require(w_D, DType::kBf16, {D}, "rms_norm_backward: w");
  require(rstd_T, DType::kFp32, {T}, "rms_norm_backward: rstd");
  require(dx_TD, DType::kBf16, {T, D}, "rms_norm_backward: dx");
  require(dw_D, DType::kFp32, {D}, "rms_norm_backward: dw");
  LOCKSTEP_CUDA_CALL(ctx, rms_norm_backward, ctx, dh_TD, d_residual_TD, x_TD, w_D, rstd_T, dx_TD,
                     dw_D);
  LOCKSTEP_CPU_CALL(ctx, rms_norm_backward, ctx, dh_TD, d_residual_TD, x_TD, w_D, rstd_T, dx_TD,
                    dw_D);
}

void rope_table(double theta, const TensorView& cos_PK, const TensorView& sin_PK) {
  require(cos_PK, DType::kFp32, {-1, -1}, "rope_table: cos");
  LOCKSTEP_CHECK(theta > 0, "rope_table: theta {}", theta);
  const std::int64_t half = cos_PK.dim(1);
  std::vector<double> inverse_frequencies;
  for (std::int64_t i = 0; i < half; ++i)
    inverse_frequencies.push_back(
        std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(2 * half)));
  rope_table(inverse_frequencies, 1.0, cos_PK, sin_PK);
}

void rope_table(std::span<const double> inverse_frequencies, double factor,
                const TensorView& cos_PK, const TensorView& sin_PK) {
  const auto half = static_cast<std::int64_t>(inverse_frequencies.size());
  require(cos_PK, DType::kFp32, {-1, half}, "rope_table: cos");
  require(sin_PK, DType::kFp32, cos_PK.shape, "rope_table: sin");
  LOCKSTEP_CHECK(cos_PK.on_host() && sin_PK.on_host(),
                 "rope_table: the tables are made on the CPU");
  const std::int64_t P = cos_PK.dim(0);
  auto* c = cos_PK.as<float>();
  auto* s = sin_PK.as<float>();
  for (std::int64_t i = 0; i < half; ++i)
    for (std::int64_t p = 0; p < P; ++p) {
      const double angle = static_cast<double>(p) * inverse_frequencies[i];
      c[p * half + i] = static_cast<float>(std::cos(angle) * factor);
      s[p * half + i] = static_cast<float>(std::sin(angle) * factor);
    }
}

namespace {

void require_heads(const HeadColumns& x, const Shape& THK, const char* name) {
  require(x.slab_TN, DType::kBf16, {THK[0], -1}, name);
  const std::int64_t end = x.column + THK[1] * THK[2];
  LOCKSTEP_CHECK(x.column >= 0 && end <= x.slab_TN.dim(1), "{}: columns [{}, {}) of {}", name,
                 x.column, end, x.slab_TN.dim(1));
}

void require_head_op(const HeadColumns& x, const TensorView& w_K, const TensorView& positions_T,
                     const TensorView& cos_PK, const TensorView& sin_PK, const TensorView& rstd_TH,
                     const TensorView& heads_THK) {
  require(heads_THK, DType::kBf16, {-1, -1, -1}, "head_norm_rope: heads");
  const Shape& shape = heads_THK.shape;
  const std::int64_t T = shape[0], K = shape[2];
  LOCKSTEP_CHECK(K > 0 && K <= cpu::kMaxHeadWidth, "head_norm_rope: head width {}", K);
  require_heads(x, shape, "head_norm_rope: x");
  if (w_K) {
    require(w_K, DType::kBf16, {K}, "head_norm_rope: w");
    require(rstd_TH, DType::kFp32, {T, shape[1]}, "head_norm_rope: rstd");
  }
  if (!cos_PK) return;
  LOCKSTEP_CHECK(K % 2 == 0, "head_norm_rope: rotation of odd head width {}", K);
  require(cos_PK, DType::kFp32, {-1, K / 2}, "head_norm_rope: cos");
  require(sin_PK, DType::kFp32, cos_PK.shape, "head_norm_rope: sin");
  require(positions_T, DType::kInt32, {T}, "head_norm_rope: positions");
  LOCKSTEP_CHECK(T == 0 || cos_PK.dim(0) > 0, "head_norm_rope: the table has no positions");
  if (!positions_T.on_host()) return;
  const auto* positions = positions_T.as<std::int32_t>();
  for (std::int64_t t = 0; t < T; ++t)
    LOCKSTEP_CHECK(positions[t] >= 0 && positions[t] < cos_PK.dim(0),
                   "head_norm_rope: token {} at position {}, the table has {}", t, positions[t],
                   cos_PK.dim(0));
}

}  // namespace

void head_norm_rope(const Context& ctx, const HeadColumns& x, const TensorView& w_K, float eps,
                    const TensorView& positions_T, const TensorView& cos_PK,
                    const TensorView& sin_PK, const TensorView& rstd_TH,
                    const TensorView& out_THK) {
  require_head_op(x, w_K, positions_T, cos_PK, sin_PK, rstd_TH, out_THK);
  LOCKSTEP_CUDA_CALL(ctx, head_norm_rope, ctx, x, w_K, eps, positions_T, cos_PK, sin_PK, rstd_TH,
                     out_THK);
  LOCKSTEP_CPU_CALL(ctx, head_norm_rope, ctx, x, w_K, eps, positions_T, cos_PK, sin_PK, rstd_TH,
                    out_THK);
}

void head_norm_rope_backward(const Context& ctx, const TensorView& d_out_THK, const HeadColumns& x,
                             const TensorView& w_K, const TensorView& positions_T,
                             const TensorView& cos_PK, const TensorView& sin_PK,
                             const TensorView& rstd_TH, const HeadColumns& d_x,
                             const TensorView& dw_K) {
  require_head_op(x, w_K, positions_T, cos_PK, sin_PK, rstd_TH, d_out_THK);
  require_heads(d_x, d_out_THK.shape, "head_norm_rope_backward: d_x");
  if (w_K) require(dw_K, DType::kFp32, {d_out_THK.dim(2)}, "head_norm_rope_backward: dw");
  LOCKSTEP_CUDA_CALL(ctx, head_norm_rope_backward, ctx, d_out_THK, x, w_K, positions_T, cos_PK,
                     sin_PK, rstd_TH, d_x, dw_K);
  LOCKSTEP_CPU_CALL(ctx, head_norm_rope_backward, ctx, d_out_THK, x, w_K, positions_T, cos_PK,
                    sin_PK, rstd_TH, d_x, dw_K);
}

}  // namespace lockstep::ops

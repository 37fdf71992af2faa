// RMSNorm with residual, and per-head norm with rotary embedding (docs/numerics.md, sections 7 and
// 11).
#pragma once

#include <span>

#include "ops/operand.h"

namespace lockstep::ops {

// x_out = bf16(x + delta) (delta empty: x_out = x, may alias x); rstd_T FP32; h = bf16(x_out * rstd
// * w). x, delta, x_out, h: BF16 [T, D]; w: BF16 [D].
void rms_norm(const Context& ctx, const TensorView& x_TD, const TensorView& delta_TD,
              const TensorView& w_D, float eps, const TensorView& x_out_TD, const TensorView& h_TD,
              const TensorView& rstd_T);

// x_TD is the normalised input (x_out of the forward). dx = bf16(norm backward of dh + d_residual);
// d_residual may be empty, dx may alias it. dw_D FP32, added to.
void rms_norm_backward(const Context& ctx, const TensorView& dh_TD, const TensorView& d_residual_TD,
                       const TensorView& x_TD, const TensorView& w_D, const TensorView& rstd_T,
                       const TensorView& dx_TD, const TensorView& dw_D);

// cos and sin of p * theta^(-2i/K) for position p and pair i < K/2, in double, rounded to FP32;
// [P, K/2] each, on the CPU.
void rope_table(double theta, const TensorView& cos_PK, const TensorView& sin_PK);

// The same of p * inverse_frequencies[i], both times `factor`.
void rope_table(std::span<const double> inverse_frequencies, double factor,
                const TensorView& cos_PK, const TensorView& sin_PK);

// A projection's heads inside a wider row: head j of token t is at x[t * row_stride + column + j *
// K].
struct HeadColumns {
  TensorView slab_TN;  // BF16 [T, N]
  std::int64_t column = 0;
};

// out_THK = rope(norm(x)); w_K empty: no norm; cos/sin empty: no rotation (positions_T may then be
// empty too). positions_T int32; one outside [0, P) is a ContractError (on the GPU, where nobody
// can report it, the nearest one inside is taken). rstd_TH FP32 (empty without norm). K is even
// where there is a rotation, and at most 1024.
void head_norm_rope(const Context& ctx, const HeadColumns& x, const TensorView& w_K, float eps,
                    const TensorView& positions_T, const TensorView& cos_PK,
                    const TensorView& sin_PK, const TensorView& rstd_TH, const TensorView& out_THK);

// d_x gets the gradient in the same columns of its slab; dw_K FP32, added to (empty without norm).
void head_norm_rope_backward(const Context& ctx, const TensorView& d_out_THK, const HeadColumns& x,
                             const TensorView& w_K, const TensorView& positions_T,
                             const TensorView& cos_PK, const TensorView& sin_PK,
                             const TensorView& rstd_TH, const HeadColumns& d_x,
                             const TensorView& dw_K);

}  // namespace lockstep::ops

#pragma once

#include "ops/norm.h"

namespace lockstep::ops::cuda {

void rms_norm(const Context& ctx, const TensorView& x_TD, const TensorView& delta_TD,
              const TensorView& w_D, float eps, const TensorView& x_out_TD, const TensorView& h_TD,
              const TensorView& rstd_T);
void rms_norm_backward(const Context& ctx, const TensorView& dh_TD, const TensorView& d_residual_TD,
                       const TensorView& x_TD, const TensorView& w_D, const TensorView& rstd_T,
                       const TensorView& dx_TD, const TensorView& dw_D);
void head_norm_rope(const Context& ctx, const HeadColumns& x, const TensorView& w_K, float eps,
                    const TensorView& positions_T, const TensorView& cos_PK,
                    const TensorView& sin_PK, const TensorView& rstd_TH, const TensorView& out_THK);
void head_norm_rope_backward(const Context& ctx, const TensorView& d_out_THK, const HeadColumns& x,
                             const TensorView& w_K, const TensorView& positions_T,
                             const TensorView& cos_PK, const TensorView& sin_PK,
                             const TensorView& rstd_TH, const HeadColumns& d_x,
                             const TensorView& dw_K);

}  // namespace lockstep::ops::cuda

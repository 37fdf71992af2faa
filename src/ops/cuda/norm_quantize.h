// ops/norm_quantize.h on a GPU.
#pragma once

#include "ops/quantize.h"

namespace lockstep::ops::cuda {

void rms_norm_quantize(const Context& ctx, const TensorView& x_TD, const TensorView& delta_TD,
                       const TensorView& w_D, float eps, const TensorView& x_out_TD,
                       const TensorView& h_TD, const TensorView& rstd_T, const Segments& segments,
                       bool pow2, const Fp8Rows& rows, const Fp8Columns* columns,
                       QuantStats* stats);

}  // namespace lockstep::ops::cuda

// RMSNorm with residual whose result is quantized in the same op (docs/numerics.md, sections 5 and
// 7): the same bits as rms_norm followed by quantize_rows and quantize_columns.
#pragma once

#include "ops/norm.h"
#include "ops/quantize.h"

namespace lockstep::ops {

// x_TD, delta_TD (may be empty), w_D, eps, x_out_TD and rstd_T as in rms_norm. h_TD (BF16 [T, D])
// gets the normalised values, or is empty. rows: the codes of h; columns, when not null: its column
// codes, and then the segments hold all T rows and both have the same kind of scales. stats count
// the row codes only.
void rms_norm_quantize(const Context& ctx, const TensorView& x_TD, const TensorView& delta_TD,
                       const TensorView& w_D, float eps, const TensorView& x_out_TD,
                       const TensorView& h_TD, const TensorView& rstd_T, const Segments& segments,
                       bool pow2, const Fp8Rows& rows, const Fp8Columns* columns,
                       QuantStats* stats);

}  // namespace lockstep::ops

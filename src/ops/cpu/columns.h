// The CPU's norm and rotary embedding of columns (ops/columns.h), arguments already checked.
#pragma once

#include "ops/columns.h"
#include "ops/cpu/isa.h"

namespace lockstep::ops::cpu {

LOCKSTEP_CPU_DECLARE(
    void rms_norm_columns(const Context& ctx, const Columns& x, const TensorView& w_D, float eps,
                          const Columns& h, const TensorView& rstd_T);
    void rms_norm_columns_backward(const Context& ctx, const Columns& d_h, const Columns& x,
                                   const TensorView& w_D, const TensorView& rstd_T,
                                   const Columns& d_x, const TensorView& dw_D);
    void rope_columns(const Context& ctx, const Columns& x, std::int64_t heads, RopePairs pairs,
                      const TensorView& positions_T, const TensorView& cos_PR,
                      const TensorView& sin_PR, const Columns& out);
    void rope_columns_backward(const Context& ctx, const Columns& d_out, std::int64_t heads,
                               RopePairs pairs, const TensorView& positions_T,
                               const TensorView& cos_PR, const TensorView& sin_PR,
                               const Columns& d_x);)

}  // namespace lockstep::ops::cpu

#pragma once

#include "ops/cpu/isa.h"
#include "ops/operand.h"

namespace lockstep::ops::cpu {

LOCKSTEP_CPU_DECLARE(void add_bias(const Context& ctx, const TensorView& x_TN,
                                   const TensorView& bias_N, const TensorView& out_TN);
                     void bias_backward(const Context& ctx, const TensorView& dy_TN,
                                        const TensorView& d_bias_N);
                     void clip(const Context& ctx, const TensorView& x, numerics::Bf16 limit);
                     void clip_backward(const Context& ctx, const TensorView& x,
                                        numerics::Bf16 limit, const TensorView& d);)

}  // namespace lockstep::ops::cpu

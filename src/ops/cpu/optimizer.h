// The CPU's optimizer (ops/optimizer.h).
#pragma once

#include "ops/adamw_factors.h"
#include "ops/cpu/isa.h"
#include "ops/optimizer.h"

namespace lockstep::ops::cpu {

LOCKSTEP_CPU_DECLARE(void adamw(const Context& ctx, const TensorView& grad,
                                const AdamwFactors& factors, const TensorView& master,
                                const TensorView& m, const TensorView& v, const TensorView& w);
                     double sum_of_squares(const Context& ctx, const TensorView* grads,
                                           std::int64_t count);
                     std::int64_t count_nonfinite(const Context& ctx, const TensorView& x);)

}  // namespace lockstep::ops::cpu

// The CPU's optimizer (ops/optimizer.h).
#pragma once

#include "ops/cpu/isa.h"
#include "ops/optimizer.h"

namespace lockstep::ops::cpu {

// AdamW's factors in FP32, each rounded once from double.
struct AdamwFactors {
  float lr, beta1, beta2, eps, decay, correction1, correction2, clip;
};

LOCKSTEP_CPU_DECLARE(void adamw(const Context& ctx, const TensorView& grad,
                                const AdamwFactors& factors, const TensorView& master,
                                const TensorView& m, const TensorView& v, const TensorView& w);
                     double sum_of_squares(const Context& ctx, const TensorView* grads,
                                           std::int64_t count);
                     std::int64_t count_nonfinite(const Context& ctx, const TensorView& x);)

}  // namespace lockstep::ops::cpu

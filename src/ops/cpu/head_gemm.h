// CPU forms of ops/head_gemm.h, arguments already checked.
#pragma once

#include "ops/cpu/isa.h"
#include "ops/head_gemm.h"

namespace lockstep::ops::cpu {

LOCKSTEP_CPU_DECLARE(void head_gemm(const Context& ctx, const Columns& a, const HeadRows& b,
                                    BLayout layout, const Columns& d);
                     void head_weight_gradient(const Context& ctx, const Columns& y,
                                               const Columns& x, bool accumulate,
                                               const HeadRows& d);)

}  // namespace lockstep::ops::cpu

// The CPU's token embedding (ops/embedding.h). Token ids were checked.
#pragma once

#include "ops/cpu/isa.h"
#include "ops/embedding.h"

namespace lockstep::ops::cpu {

LOCKSTEP_CPU_DECLARE(void embedding(const Context& ctx, const TensorView& tokens_T,
                                    const TensorView& w_VD, const TensorView& x_TD);
                     void embedding_backward(const Context& ctx, const TensorView& tokens_T,
                                             const TensorView& dx_TD, const TensorView& dw_VD);)

}  // namespace lockstep::ops::cpu

// Token embedding (docs/numerics.md, section 11).
#pragma once

#include "ops/operand.h"

namespace lockstep::ops {

// x[t] = w[token t], BF16; tokens_T int32. A token outside [0, V) is a ContractError that names it
// (on the GPU, where nobody can report it, the nearest one inside is taken).
void embedding(const Context& ctx, const TensorView& tokens_T, const TensorView& w_VD,
               const TensorView& x_TD);

// dw_VD FP32 += dx rows (BF16), for each token id in ascending order of t.
void embedding_backward(const Context& ctx, const TensorView& tokens_T, const TensorView& dx_TD,
                        const TensorView& dw_VD);

}  // namespace lockstep::ops

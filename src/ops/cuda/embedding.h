#pragma once

#include "ops/embedding.h"

namespace lockstep::ops::cuda {

void embedding(const Context& ctx, const TensorView& tokens_T, const TensorView& w_VD,
               const TensorView& x_TD);
void embedding_backward(const Context& ctx, const TensorView& tokens_T, const TensorView& dx_TD,
                        const TensorView& dw_VD);

}  // namespace lockstep::ops::cuda

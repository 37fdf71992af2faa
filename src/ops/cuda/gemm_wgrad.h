// Weight gradients on the GPU (ops/gemm.h), arguments already checked.
#pragma once

#include "ops/gemm.h"

namespace lockstep::ops::cuda {

void fp8_weight_gradient(const Context& ctx, const Fp8Columns& dy, const Fp8Columns& x,
                         const Segments& segments, bool accumulate, const TensorView& d_ENK);
void bf16_weight_gradient(const Context& ctx, const TensorView& dy_MN, const TensorView& x_MK,
                          const TensorView& offsets_E1, bool accumulate, const TensorView& d_ENK,
                          std::int64_t chain_rows);

}  // namespace lockstep::ops::cuda

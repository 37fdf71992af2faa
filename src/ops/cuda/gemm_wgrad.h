// FP8 weight gradient on the GPU (ops/gemm.h), arguments already checked.
#pragma once

#include "ops/gemm.h"

namespace lockstep::ops::cuda {

void fp8_weight_gradient(const Context& ctx, const Fp8Columns& dy, const Fp8Columns& x,
                         const Segments& segments, bool accumulate, const TensorView& d_ENK);

}  // namespace lockstep::ops::cuda

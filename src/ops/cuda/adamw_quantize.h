// ops/adamw_quantize.h on a GPU.
#pragma once

#include "ops/adamw_factors.h"
#include "ops/quantize.h"

namespace lockstep::ops::cuda {

void adamw_quantize(const Context& ctx, const TensorView& grad, const AdamwFactors& factors,
                    const TensorView& master, const TensorView& m, const TensorView& v,
                    const TensorView& w, bool pow2, const Fp8Weight& out, const Fp8Weight& out_t,
                    QuantStats* stats);

}  // namespace lockstep::ops::cuda

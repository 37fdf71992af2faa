// The GPU's optimizer (ops/optimizer.h).
#pragma once

#include "ops/adamw_factors.h"
#include "ops/optimizer.h"

namespace lockstep::ops::cuda {

void adamw(const Context& ctx, const TensorView& grad, const AdamwFactors& factors,
           const TensorView& master, const TensorView& m, const TensorView& v, const TensorView& w);

// These two wait for their result.
double global_norm(const Context& ctx, const std::vector<TensorView>& grads);
std::int64_t count_nonfinite(const Context& ctx, const TensorView& x);

}  // namespace lockstep::ops::cuda

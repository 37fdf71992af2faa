// What the backends of adamw and adamw_quantize take, and the checks that both ops share.
#pragma once

#include "ops/optimizer.h"

namespace lockstep::ops {

// AdamW's factors in FP32, each rounded once from double.
struct AdamwFactors {
  float lr, beta1, beta2, eps, decay, correction1, correction2, clip;
};

// ContractError, with the op's name, on options outside their range.
AdamwFactors adamw_factors(const AdamwOptions& options, const char* op);

// ContractError, with the op's name, where dtypes or counts are not those of ops/optimizer.h.
void require_adamw(const TensorView& grad, const TensorView& master, const TensorView& m,
                   const TensorView& v, const TensorView& w, const char* op);

}  // namespace lockstep::ops

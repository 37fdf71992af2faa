// What both backends of adamw take.
#pragma once

namespace lockstep::ops {

// AdamW's factors in FP32, each rounded once from double.
struct AdamwFactors {
  float lr, beta1, beta2, eps, decay, correction1, correction2, clip;
};

}  // namespace lockstep::ops

// Scalars of RMSNorm and its backward (docs/numerics.md, sections 7 and 11), for norms of whole
// rows, of heads and of columns.
#pragma once

#include "numerics/reduce.h"
#include "ops/cpu/isa.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {

inline float reciprocal_rms(const numerics::Bf16* x, std::int64_t n, float eps) {
  const float sum = numerics::lane_sum<float>(n, [x](std::int64_t i, float acc) {
    const float v = numerics::to_float(x[i]);
    return numerics::fma(v, v, acc);
  });
  return 1.0f / __builtin_sqrtf(sum / static_cast<float>(n) + eps);
}

// The factor of -x in the backward, from t = sum of (dh*w) * x.
inline float rms_backward_factor(float t, float rstd, std::int64_t n) {
  return ((t * rstd) * (rstd * rstd)) / static_cast<float>(n);
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA

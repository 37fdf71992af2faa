// AdamW on eight neighbouring values (docs/numerics.md, section 13), for the kernels that step.
#pragma once

#include "numerics/math.h"
#include "ops/adamw_factors.h"

namespace lockstep::ops::cuda {

inline constexpr int kStepValues = 8;  // a thread's: 16 bytes of BF16, twice 16 bytes of FP32

template <typename T>
struct alignas(16) StepValues {
  T x[kStepValues];
};
static_assert(sizeof(StepValues<numerics::Bf16>) == 16 && sizeof(StepValues<float>) == 32);

__device__ inline float load_moment(float x) { return x; }
__device__ inline float load_moment(numerics::Bf16 x) { return numerics::to_float(x); }
__device__ inline void store_moment(float x, float& to) { to = x; }
__device__ inline void store_moment(float x, numerics::Bf16& to) { to = numerics::to_bf16(x); }

template <typename M, typename V>
__device__ inline void adamw_step(float grad, const AdamwFactors& f, float& master, M& m_to,
                                  V& v_to) {
  const float g = grad * f.clip;
  const float m = numerics::fma(f.beta1, load_moment(m_to), (1.0f - f.beta1) * g);
  const float v = numerics::fma(f.beta2, load_moment(v_to), (1.0f - f.beta2) * (g * g));
  const float mhat = m * f.correction1, vhat = v * f.correction2;
  const float decayed = numerics::fma(-f.decay, master, master);
  master = decayed - f.lr * (mhat / (sqrtf(vhat) + f.eps));
  store_moment(m, m_to);
  store_moment(v, v_to);
}

}  // namespace lockstep::ops::cuda

// SwiGLU of eight neighbouring columns (docs/numerics.md, sections 2, 7 and 11).
#pragma once

#include "ops/cuda/quantize_block.cuh"

namespace lockstep::ops::cuda {

// numerics::sigmoid in fewer instructions, for BF16 gates (tests/gpu/swiglu_test.cpp compares every
// one). 1 + e^x does not change below x = -60; the polynomial is halved, so that the exponent fits
// where e^x overflows; one Newton step makes the approximate reciprocal the nearest one, as in the
// division itself, and min() keeps it 0 for an infinity. A NaN gives any value.
__device__ inline float fast_sigmoid(float g) {
  const float x = fminf(fmaxf(-g, -60.0f), 88.75f);
  const float t = x * numerics::kLog2e + numerics::kRoundMagic;
  const float n = t - numerics::kRoundMagic;
  float f = numerics::fma(x, numerics::kLog2e, -n);
  f = numerics::fma(x, numerics::kLog2eLow, f);
  const float half = 0.5f * numerics::exp2_polynomial(f);
  const float e = numerics::bits_float(numerics::float_bits(half) +
                                       (numerics::float_bits(t) << 23));  // e^x / 2
  const float d = numerics::fma(e, 2.0f, 1.0f);
  float r;
  asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(d));
  return numerics::fma(r, numerics::fma(-fminf(d, 3.402823466e+38f), r, 1.0f), r);
}

__device__ inline float swiglu_product(float g, float u) { return (g * fast_sigmoid(g)) * u; }

struct SwigluGradient {
  float gate, up;
};
__device__ inline SwigluGradient swiglu_gradient(float g, float u, float d) {
  const float sg = fast_sigmoid(g);
  return {((d * u) * sg) * numerics::fma(g, 1.0f - sg, 1.0f), d * (g * sg)};
}

}  // namespace lockstep::ops::cuda

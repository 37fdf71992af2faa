// A token's scores on a warp: expert e on lane e % 32, in register e / 32 (the order of
// strided_sum). Registers behind the last expert hold +0, up to a multiple of 32 experts.
#pragma once

#include "ops/cuda/router.h"
#include "ops/cuda/rows.cuh"

namespace lockstep::ops::cuda {

// Scores s of the logits z of one token. The CPU's padding to a multiple of 32 is kept: a sum over
// whole groups of 32.
template <int kSlots>
__device__ float padded_sum(const float (&s)[kSlots], int E) {
  float lane = 0.0f;
#pragma unroll
  for (int i = 0; i < kSlots; ++i)
    if (i * 32 < E) lane = lane + s[i];
  return butterfly_sum(lane);
}

template <int kSlots>
__device__ float padded_dot(const float (&x)[kSlots], const float (&y)[kSlots], int E) {
  float lane = 0.0f;
#pragma unroll
  for (int i = 0; i < kSlots; ++i)
    if (i * 32 < E) lane = numerics::fma(x[i], y[i], lane);
  return butterfly_sum(lane);
}

template <int kSlots>
__device__ void token_scores(const float* z, int E, RouterScore kind, float (&s)[kSlots]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) s[i] = lane + 32 * i < E ? z[lane + 32 * i] : 0.0f;
  if (kind == RouterScore::kSigmoid) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) s[i] = lane + 32 * i < E ? numerics::sigmoid(s[i]) : 0.0f;
    return;
  }
  float max = -std::numeric_limits<float>::infinity();
#pragma unroll
  for (int i = 0; i < kSlots; ++i)
    if (lane + 32 * i < E) max = s[i] > max ? s[i] : max;
#pragma unroll
  for (int d = 16; d >= 1; d /= 2) {
    const float other = __shfl_xor_sync(kFullWarp, max, d);
    max = other > max ? other : max;
  }
#pragma unroll
  for (int i = 0; i < kSlots; ++i) s[i] = lane + 32 * i < E ? numerics::exp(s[i] - max) : 0.0f;
  const float sum = padded_sum(s, E);
#pragma unroll
  for (int i = 0; i < kSlots; ++i)
    if (lane + 32 * i < E) s[i] = s[i] / sum;
}

// Balance scores q of a token, in place.
template <int kSlots>
__device__ void balance_scores(float (&s)[kSlots], int E, RouterScore kind) {
  if (kind != RouterScore::kSigmoid) return;
  const float sum = padded_sum(s, E);
#pragma unroll
  for (int i = 0; i < kSlots; ++i)
    if (i * 32 < E) s[i] = s[i] / sum;
}

// Added to the sum of the chosen scores, where they divide.
__device__ inline float divisor_floor(RouterScore kind) {
  return kind == RouterScore::kSigmoid ? 1e-20f : 0.0f;
}

inline constexpr int kRouterWarps = 4;

// Calls f(integral_constant<int, registers a lane needs for E experts>).
template <typename F>
void with_slots(std::int64_t E, F f) {
  if (E <= 128)
    f(std::integral_constant<int, 4>());
  else if (E <= 256)
    f(std::integral_constant<int, 8>());
  else
    f(std::integral_constant<int, kMaxExperts / 32>());
}

}  // namespace lockstep::ops::cuda

// One row of the heads' norm backward, (token, head), on K / 16 lanes: a lane has two chunks of
// eight columns, K / 2 apart, which the rotation mixes.
#pragma once

#include "ops/cuda/head_norm.cuh"

namespace lockstep::ops::cuda {

// What a row needs besides d_out and x.
struct RowValues {
  float4 cos[2], sin[2];
  float rstd;
};

__device__ inline RowValues load_values(const Heads& a, int r, int t, int rows, int pair) {
  RowValues l{};
  if (r >= rows) return l;
  l.rstd = a.rstd[r];
  if (a.cos == nullptr) return l;
  const std::int64_t at = table_row(a, t) + pair * 8;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    l.cos[i] = __ldg(reinterpret_cast<const float4*>(a.cos + at) + i);
    l.sin[i] = __ldg(reinterpret_cast<const float4*>(a.sin + at) + i);
  }
  return l;
}

__device__ inline void spread(const float4 (&v)[2], float (&out)[8]) {
  out[0] = v[0].x, out[1] = v[0].y, out[2] = v[0].z, out[3] = v[0].w;
  out[4] = v[1].x, out[5] = v[1].y, out[6] = v[1].z, out[7] = v[1].w;
}

// dy of one chunk pair, in place.
__device__ inline void turn_back(const RowValues& l, float (&low)[8], float (&high)[8]) {
  float c[8], s[8];
  spread(l.cos, c);
  spread(l.sin, s);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const float d1 = low[k], d2 = high[k];
    low[k] = numerics::fma(d1, c[k], d2 * s[k]);
    high[k] = numerics::fma(d2, c[k], -(d1 * s[k]));
  }
}

__device__ inline float chunk_sum(const float (&dy)[8], const float (&w)[8], const float (&v)[8]) {
  float acc = 0.0f;
#pragma unroll
  for (int k = 0; k < 8; ++k) acc = numerics::fma(dy[k] * w[k], v[k], acc);
  return acc;
}

__device__ inline uint4 gradient(const float (&dy)[8], const float (&w)[8], const float (&v)[8],
                                 float factor, float rstd) {
  float out[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) out[k] = numerics::fma(-v[k], factor, rstd * (dy[k] * w[k]));
  return pack(out);
}

// The factor of -x from the lane's shares of t; the lanes' order is that of lane_sum, in which
// those without elements add +0.
template <int kPairs>
__device__ inline float head_factor(float low, float high, float rstd) {
  if (kPairs < 16) low = low + 0.0f, high = high + 0.0f;
  float sum = low + high;
#pragma unroll
  for (int d = kPairs / 2; d >= 1; d /= 2) sum = sum + __shfl_xor_sync(kFullWarp, sum, d);
  // The division of backward_factor: by a power of two a product has the same bits.
  return ((sum * rstd) * (rstd * rstd)) * (1.0f / (16 * kPairs));
}

}  // namespace lockstep::ops::cuda

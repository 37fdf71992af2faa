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

// d_x alone, without the blocks' order: a thread two chunks.
constexpr int kRowThreads = 256;
template <int kPairs>
__global__ void __launch_bounds__(kRowThreads) head_d_x_kernel(Heads a) {
  constexpr int kRows = kRowThreads / kPairs;
  const int pair = static_cast<int>(threadIdx.x) % kPairs, rows = static_cast<int>(a.T) * a.H;
  const int r = static_cast<int>(blockIdx.x) * kRows + static_cast<int>(threadIdx.x) / kPairs;
  const int t = r / a.H, j = r % a.H;
  const bool present = r < rows;
  uint4 raw[4] = {}, w[2];
  if (present) {
    const auto* d_out = reinterpret_cast<const uint4*>(a.d_out) + std::int64_t{r} * 2 * kPairs;
    const auto* x = reinterpret_cast<const uint4*>(a.x) + t * (a.x_stride / 8) + j * 2 * kPairs;
    raw[0] = __ldg(d_out + pair);
    raw[1] = __ldg(d_out + pair + kPairs);
    raw[2] = __ldg(x + pair);
    raw[3] = __ldg(x + pair + kPairs);
  }
  const RowValues values = load_values(a, r, t, rows, pair);
  w[0] = __ldg(reinterpret_cast<const uint4*>(a.w) + pair);
  w[1] = __ldg(reinterpret_cast<const uint4*>(a.w) + pair + kPairs);
  float d_low[8], d_high[8], x_low[8], x_high[8], w_low[8], w_high[8];
  unpack(raw[0], d_low);
  unpack(raw[1], d_high);
  unpack(raw[2], x_low);
  unpack(raw[3], x_high);
  unpack(w[0], w_low);
  unpack(w[1], w_high);
  if (a.cos != nullptr) turn_back(values, d_low, d_high);
  const float factor = head_factor<kPairs>(chunk_sum(d_low, w_low, x_low),
                                           chunk_sum(d_high, w_high, x_high), values.rstd);
  if (!present) return;
  auto* out = reinterpret_cast<uint4*>(a.out) + t * (a.out_stride / 8) + j * 2 * kPairs + pair;
  out[0] = gradient(d_low, w_low, x_low, factor, values.rstd);
  out[kPairs] = gradient(d_high, w_high, x_high, factor, values.rstd);
}

}  // namespace lockstep::ops::cuda

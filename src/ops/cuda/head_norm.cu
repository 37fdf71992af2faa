#include "ops/cuda/head_norm.cuh"
#include "ops/cuda/norm.h"

namespace lockstep::ops::cuda {
namespace {

constexpr int kHeads = 4;  // of one token that a group of lanes takes together
constexpr int kWarps = 8;

// inverse_K: 1 / K where that is exact (a power of two: then the product has the quotient's bits),
// or 0. `lanes` (a power of two) hold a head, a chunk each. Idle lanes keep the sums' order: they
// add +0.
__global__ void __launch_bounds__(32 * kWarps)
    head_chunks_kernel(Heads a, int lanes, float turn, float inverse_K) {
  const int lane = threadIdx.x % 32, q = lane % lanes, chunks = a.K / 8;
  const int head_groups = (a.H + kHeads - 1) / kHeads;
  const std::int64_t items = a.T * head_groups;
  const std::int64_t item =
      (std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32) * (32 / lanes) + lane / lanes;
  const bool active = item < items && q < chunks;
  const std::int64_t t = active ? item / head_groups : 0;
  const int j0 = static_cast<int>(item % head_groups) * kHeads;

  uint4 raw[kHeads] = {};
#pragma unroll
  for (int i = 0; i < kHeads; ++i)
    if (active && j0 + i < a.H)
      raw[i] = *reinterpret_cast<const uint4*>(a.x + t * a.x_stride + (j0 + i) * a.K + q * 8);
  uint4 w = {};
  float c[8], s[8];
  int partner = lane;
  if (a.w != nullptr && active) w = __ldg(reinterpret_cast<const uint4*>(a.w) + q);
  if (a.cos != nullptr) {
    const int half = chunks / 2, pair = q < half ? q : q - half;
    partner = lane - q + (q < half ? q + half : pair);
    if (active) {
      const std::int64_t at = table_row(a, t) + pair * 8;
      const float sign = q < half ? -turn : turn;
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        c[k] = __ldg(a.cos + at + k);
        s[k] = sign * __ldg(a.sin + at + k);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const bool present = active && j0 + i < a.H;
    float y[8];
    unpack(raw[i], y);
    if (a.w != nullptr) {
      float sum = 0.0f;
      if (present) {
#pragma unroll
        for (int k = 0; k < 8; ++k) sum = numerics::fma(y[k], y[k], sum);
      }
      if (lanes < 32) sum = sum + 0.0f;
#pragma unroll
      for (int d = 16; d >= 1; d /= 2)
        if (d < lanes) sum = sum + __shfl_xor_sync(kFullWarp, sum, d);
      const float mean = inverse_K != 0.0f ? sum * inverse_K : sum / static_cast<float>(a.K);
      const float rstd = 1.0f / sqrtf(mean + a.eps);
      if (present && q == 0) a.rstd[t * a.H + j0 + i] = rstd;
      float scale[8];
      unpack(w, scale);
#pragma unroll
      for (int k = 0; k < 8; ++k) y[k] = (y[k] * rstd) * scale[k];
    }
    if (a.cos != nullptr) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float other = __shfl_sync(kFullWarp, y[k], partner);
        y[k] = numerics::fma(y[k], c[k], other * s[k]);
      }
    }
    if (present)
      *reinterpret_cast<uint4*>(a.out + t * a.out_stride + (j0 + i) * a.K + q * 8) = pack(y);
  }
}

}  // namespace

bool head_in_chunks(const Heads& a) {
  return a.K <= 256 && a.K % (a.cos != nullptr ? 16 : 8) == 0 && a.x_stride % 8 == 0 &&
         a.out_stride % 8 == 0 && in_chunks(a.K, a.x, a.d_out, a.out, a.w, a.cos, a.sin);
}

void launch_head_chunks(const Heads& a, float turn, cudaStream_t stream) {
  const float inverse_K = (a.K & (a.K - 1)) == 0 ? 1.0f / static_cast<float>(a.K) : 0.0f;
  int lanes = 1;
  while (lanes * 8 < a.K) lanes *= 2;
  const std::int64_t items = a.T * ((a.H + kHeads - 1) / kHeads);
  const unsigned blocks = blocks_for(items, std::int64_t{kWarps} * (32 / lanes));
  head_chunks_kernel<<<blocks, 32 * kWarps, 0, stream>>>(a, lanes, turn, inverse_K);
  LOCKSTEP_CUDA_LAUNCHED("head_norm_rope");
}

void head_norm_rope(const Context& ctx, const HeadColumns& x, const TensorView& w_K, float eps,
                    const TensorView& positions_T, const TensorView& cos_PK,
                    const TensorView& sin_PK, const TensorView& rstd_TH,
                    const TensorView& out_THK) {
  Heads a{};
  a.T = out_THK.dim(0);
  a.H = static_cast<int>(out_THK.dim(1));
  a.K = static_cast<int>(out_THK.dim(2));
  a.x = x.slab_TN.as<Bf16>() + x.column;
  a.x_stride = x.slab_TN.dim(1);
  a.out = out_THK.as<Bf16>();
  a.out_stride = std::int64_t{a.H} * a.K;
  if (w_K) {
    a.w = w_K.as<Bf16>();
    a.rstd = rstd_TH.as<float>();
  }
  if (cos_PK) {
    a.positions = positions_T.as<std::int32_t>();
    a.cos = cos_PK.as<float>();
    a.sin = sin_PK.as<float>();
    a.P = cos_PK.dim(0);
  }
  a.eps = eps;
  if (a.T == 0 || a.H == 0) return;
  if (head_in_chunks(a))
    launch_head_chunks(a, 1.0f, stream_of(ctx));
  else
    launch_head_any(a, stream_of(ctx));
}

}  // namespace lockstep::ops::cuda

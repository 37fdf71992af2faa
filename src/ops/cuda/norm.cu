#include "ops/cuda/norm.cuh"
#include "ops/cuda/norm.h"

namespace lockstep::ops::cuda {
namespace {

struct RmsNorm {
  std::int64_t T, D;
  const Bf16* x;  // x_out may be x
  const Bf16* delta;
  const Bf16* w;
  Bf16* x_out;
  Bf16* h;
  float* rstd;
  float eps;
};

template <int kChunks, int kWarps>
__global__ void __launch_bounds__(kWarps == 1 ? 128 : 32 * kWarps) rms_norm_kernel(RmsNorm a) {
  const Row r = my_row<kWarps>(a.D);
  if (r.t >= a.T) return;
  const std::int64_t base = r.t * (a.D / 8);
  const auto* x = reinterpret_cast<const uint4*>(a.x) + base;
  const auto* delta = reinterpret_cast<const uint4*>(a.delta) + base;
  auto* x_out = reinterpret_cast<uint4*>(a.x_out) + base;
  auto* h = reinterpret_cast<uint4*>(a.h) + base;
  const auto* w = reinterpret_cast<const uint4*>(a.w);

  uint4 row[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i)
    if (r.chunk + 32 * i < r.end) row[i] = x[r.chunk + 32 * i];
  if (a.delta != nullptr) {
    uint4 added[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      if (r.chunk + 32 * i < r.end) added[i] = delta[r.chunk + 32 * i];
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      if (r.chunk + 32 * i < r.end) {
        float v[8], d[8];
        unpack(row[i], v);
        unpack(added[i], d);
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] = v[k] + d[k];
        row[i] = pack(v);
        x_out[r.chunk + 32 * i] = row[i];
      }
  } else if (a.x_out != a.x) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      if (r.chunk + 32 * i < r.end) x_out[r.chunk + 32 * i] = row[i];
  }

  const float sum = row_sum<kWarps>([&](float acc) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      if (r.chunk + 32 * i < r.end) {
        float v[8];
        unpack(row[i], v);
#pragma unroll
        for (int k = 0; k < 8; ++k) acc = numerics::fma(v[k], v[k], acc);
      }
    return acc;
  });
  const float rstd = reciprocal_rms(sum, a.D, a.eps);
  if (r.chunk == 0) a.rstd[r.t] = rstd;
#pragma unroll
  for (int i = 0; i < kChunks; ++i)
    if (r.chunk + 32 * i < r.end) {
      float v[8], scale[8];
      unpack(row[i], v);
      unpack(__ldg(w + r.chunk + 32 * i), scale);
#pragma unroll
      for (int k = 0; k < 8; ++k) v[k] = (v[k] * rstd) * scale[k];
      h[r.chunk + 32 * i] = pack(v);
    }
}

// Any width and alignment: a warp a row, value by value. A lane reads back what it wrote itself.
__global__ void rms_norm_any_kernel(RmsNorm a) {
  const std::int64_t t = blockIdx.x;
  const Bf16* x = a.x + t * a.D;
  Bf16* x_out = a.x_out + t * a.D;
  float acc = 0.0f;
  for (std::int64_t d0 = threadIdx.x * 8; d0 < a.D; d0 += 256)
    for (std::int64_t d = d0; d < min(d0 + 8, a.D); ++d) {
      Bf16 v = x[d];
      if (a.delta != nullptr)
        v = numerics::to_bf16(numerics::to_float(v) + numerics::to_float(a.delta[t * a.D + d]));
      x_out[d] = v;
      acc = numerics::fma(numerics::to_float(v), numerics::to_float(v), acc);
    }
  const float rstd = reciprocal_rms(butterfly_sum(acc), a.D, a.eps);
  if (threadIdx.x == 0) a.rstd[t] = rstd;
  for (std::int64_t d0 = threadIdx.x * 8; d0 < a.D; d0 += 256)
    for (std::int64_t d = d0; d < min(d0 + 8, a.D); ++d)
      a.h[t * a.D + d] =
          numerics::to_bf16((numerics::to_float(x_out[d]) * rstd) * numerics::to_float(a.w[d]));
}

}  // namespace

void rms_norm(const Context& ctx, const TensorView& x_TD, const TensorView& delta_TD,
              const TensorView& w_D, float eps, const TensorView& x_out_TD, const TensorView& h_TD,
              const TensorView& rstd_T) {
  const RmsNorm a{x_TD.dim(0),
                  x_TD.dim(1),
                  x_TD.as<Bf16>(),
                  delta_TD ? delta_TD.as<Bf16>() : nullptr,
                  w_D.as<Bf16>(),
                  x_out_TD.as<Bf16>(),
                  h_TD.as<Bf16>(),
                  rstd_T.as<float>(),
                  eps};
  if (a.T == 0) return;
  const cudaStream_t stream = stream_of(ctx);
  if (!in_chunks(a.D, a.x, a.delta, a.w, a.x_out, a.h) || a.D > 8192)
    rms_norm_any_kernel<<<static_cast<unsigned>(a.T), 32, 0, stream>>>(a);
  else if (a.D <= 512)
    launch_rows<1>(a, rms_norm_kernel<2, 1>, stream);
  else if (a.D <= 2048)
    launch_rows<2>(a, rms_norm_kernel<4, 2>, stream);
  else if (a.D <= 4096)
    launch_rows<4>(a, rms_norm_kernel<4, 4>, stream);
  else
    launch_rows<8>(a, rms_norm_kernel<4, 8>, stream);
  LOCKSTEP_CUDA_LAUNCHED("rms_norm");
}

}  // namespace lockstep::ops::cuda

#include "ops/cuda/norm.cuh"
#include "ops/cuda/norm.h"

namespace lockstep::ops::cuda {
namespace {

struct RmsNormBackward {
  std::int64_t T, D;
  const Bf16* dh;
  const Bf16* residual;  // dx may be residual
  const Bf16* x;
  const Bf16* w;
  const float* rstd;
  Bf16* dx;
};

template <int kChunks, int kWarps>
__global__ void __launch_bounds__(128) rms_norm_backward_kernel(RmsNormBackward a) {
  const Row r = my_row<kWarps>(a.D);
  if (r.t >= a.T) return;
  const std::int64_t base = r.t * (a.D / 8);
  const auto* dh = reinterpret_cast<const uint4*>(a.dh) + base;
  const auto* x = reinterpret_cast<const uint4*>(a.x) + base;
  const auto* residual = reinterpret_cast<const uint4*>(a.residual) + base;
  auto* dx = reinterpret_cast<uint4*>(a.dx) + base;
  const auto* w = reinterpret_cast<const uint4*>(a.w);
  const float rstd = a.rstd[r.t];

  uint4 dh_row[kChunks], x_row[kChunks], residual_row[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i)
    if (r.chunk + 32 * i < r.end) {
      dh_row[i] = dh[r.chunk + 32 * i];
      x_row[i] = x[r.chunk + 32 * i];
      if (a.residual != nullptr) residual_row[i] = residual[r.chunk + 32 * i];
    }
  const float sum = row_sum<kWarps>([&](float acc) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      if (r.chunk + 32 * i < r.end) {
        float g[8], v[8], scale[8];
        unpack(dh_row[i], g);
        unpack(x_row[i], v);
        unpack(__ldg(w + r.chunk + 32 * i), scale);
#pragma unroll
        for (int k = 0; k < 8; ++k) acc = numerics::fma(g[k] * scale[k], v[k], acc);
      }
    return acc;
  });
  const float factor = backward_factor(sum, rstd, a.D);
#pragma unroll
  for (int i = 0; i < kChunks; ++i)
    if (r.chunk + 32 * i < r.end) {
      float g[8], v[8], scale[8];
      unpack(dh_row[i], g);
      unpack(x_row[i], v);
      unpack(__ldg(w + r.chunk + 32 * i), scale);
#pragma unroll
      for (int k = 0; k < 8; ++k) g[k] = numerics::fma(-v[k], factor, rstd * (g[k] * scale[k]));
      if (a.residual != nullptr) {
        unpack(residual_row[i], v);
#pragma unroll
        for (int k = 0; k < 8; ++k) g[k] = g[k] + v[k];
      }
      dx[r.chunk + 32 * i] = pack(g);
    }
}

__global__ void rms_norm_backward_any_kernel(RmsNormBackward a) {
  const std::int64_t t = blockIdx.x;
  const Bf16* dh = a.dh + t * a.D;
  const Bf16* x = a.x + t * a.D;
  const float rstd = a.rstd[t];
  float acc = 0.0f;
  for (std::int64_t d0 = threadIdx.x * 8; d0 < a.D; d0 += 256)
    for (std::int64_t d = d0; d < min(d0 + 8, a.D); ++d)
      acc = numerics::fma(numerics::to_float(dh[d]) * numerics::to_float(a.w[d]),
                          numerics::to_float(x[d]), acc);
  const float factor = backward_factor(butterfly_sum(acc), rstd, a.D);
  for (std::int64_t d = threadIdx.x; d < a.D; d += 32) {
    float g = numerics::fma(-numerics::to_float(x[d]), factor,
                            rstd * (numerics::to_float(dh[d]) * numerics::to_float(a.w[d])));
    if (a.residual != nullptr) g = g + numerics::to_float(a.residual[t * a.D + d]);
    a.dx[t * a.D + d] = numerics::to_bf16(g);
  }
}

// A block of 128 rows of d_w: a thread walks them for kColumns neighbouring columns.
template <int kColumns>
__global__ void row_block_kernel(RmsNormBackward a, float* partial_BD) {
  constexpr int kRows = 8;  // in flight
  const std::int64_t d = (std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kColumns;
  if (d >= a.D) return;
  const std::int64_t begin = std::int64_t{blockIdx.y} * numerics::kRowBlock;
  const std::int64_t end = min(begin + numerics::kRowBlock, a.T);
  float acc[kColumns] = {};
  for (std::int64_t t0 = begin; t0 < end; t0 += kRows) {
    uint2 dh[kRows], x[kRows];
    float rstd[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (t0 + r >= end) continue;
      const std::int64_t at = (t0 + r) * a.D + d;
      if constexpr (kColumns == 4) {
        dh[r] = *reinterpret_cast<const uint2*>(a.dh + at);
        x[r] = *reinterpret_cast<const uint2*>(a.x + at);
      } else {
        dh[r] = {a.dh[at].bits, 0};
        x[r] = {a.x[at].bits, 0};
      }
      rstd[r] = a.rstd[t0 + r];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (t0 + r >= end) continue;
      float g[4], v[4];
      unpack_pair(dh[r].x, g[0], g[1]);
      unpack_pair(dh[r].y, g[2], g[3]);
      unpack_pair(x[r].x, v[0], v[1]);
      unpack_pair(x[r].y, v[2], v[3]);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) acc[k] = numerics::fma(g[k], v[k] * rstd[r], acc[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < kColumns; ++k) partial_BD[blockIdx.y * a.D + d + k] = acc[k];
}

__global__ void add_row_blocks_kernel(const float* partial_BN, std::int64_t blocks, std::int64_t n,
                                      float* dw_N) {
  const std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float total = 0.0f;
#pragma unroll 32
  for (std::int64_t b = 0; b < blocks; ++b) total = total + __ldg(partial_BN + b * n + i);
  dw_N[i] = dw_N[i] + total;
}

}  // namespace

void add_row_blocks(const Context& ctx, const float* partial_BN, std::int64_t blocks,
                    std::int64_t n, float* dw_N) {
  add_row_blocks_kernel<<<blocks_for(n, 32), 32, 0, stream_of(ctx)>>>(partial_BN, blocks, n, dw_N);
  LOCKSTEP_CUDA_LAUNCHED("the sum of a norm weight's gradient");
}

void rms_norm_backward(const Context& ctx, const TensorView& dh_TD, const TensorView& d_residual_TD,
                       const TensorView& x_TD, const TensorView& w_D, const TensorView& rstd_T,
                       const TensorView& dx_TD, const TensorView& dw_D) {
  const RmsNormBackward a{x_TD.dim(0),        x_TD.dim(1),
                          dh_TD.as<Bf16>(),   d_residual_TD ? d_residual_TD.as<Bf16>() : nullptr,
                          x_TD.as<Bf16>(),    w_D.as<Bf16>(),
                          rstd_T.as<float>(), dx_TD.as<Bf16>()};
  const std::int64_t blocks = (a.T + numerics::kRowBlock - 1) / numerics::kRowBlock;
  const cudaStream_t stream = stream_of(ctx);
  const bool chunks = in_chunks(a.D, a.dh, a.residual, a.x, a.w, a.dx);
  const tensor::ArenaScope scope(*ctx.workspace);
  float* partial = ctx.workspace->take(tensor::DType::kFp32, {blocks, a.D}).as<float>();
  if (a.T > 0) {
    const auto rows = static_cast<unsigned>(blocks);
    if (chunks)
      row_block_kernel<4><<<dim3(blocks_for(a.D, 4 * 64), rows), 64, 0, stream>>>(a, partial);
    else
      row_block_kernel<1><<<dim3(blocks_for(a.D, 64), rows), 64, 0, stream>>>(a, partial);
    LOCKSTEP_CUDA_LAUNCHED("rms_norm_backward: the weight's gradient");
    if (!chunks || a.D > 8192)
      rms_norm_backward_any_kernel<<<static_cast<unsigned>(a.T), 32, 0, stream>>>(a);
    else if (a.D <= 512)
      launch_rows<1>(a, rms_norm_backward_kernel<2, 1>, stream);
    else if (a.D <= 2048)
      launch_rows<1>(a, rms_norm_backward_kernel<8, 1>, stream);
    else if (a.D <= 4096)
      launch_rows<2>(a, rms_norm_backward_kernel<8, 2>, stream);
    else
      launch_rows<4>(a, rms_norm_backward_kernel<8, 4>, stream);
    LOCKSTEP_CUDA_LAUNCHED("rms_norm_backward");
  }
  add_row_blocks(ctx, partial, blocks, a.D, dw_D.as<float>());
}

}  // namespace lockstep::ops::cuda

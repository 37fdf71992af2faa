#include "ops/cuda/head_norm.cuh"

namespace lockstep::ops::cuda {
namespace {

using numerics::to_float;

// A warp (the block) a head, value by value; y in shared memory.
__global__ void head_any_kernel(Heads a) {
  extern __shared__ float y[];
  const std::int64_t t = blockIdx.x / a.H, j = blockIdx.x % a.H;
  const Bf16* head = a.x + t * a.x_stride + j * a.K;
  Bf16* out = a.out + t * a.out_stride + j * a.K;
  if (a.w != nullptr) {
    float acc = 0.0f;
    for (int i0 = threadIdx.x * 8; i0 < a.K; i0 += 256)
      for (int i = i0; i < min(i0 + 8, a.K); ++i)
        acc = numerics::fma(to_float(head[i]), to_float(head[i]), acc);
    const float rstd = reciprocal_rms(butterfly_sum(acc), a.K, a.eps);
    if (threadIdx.x == 0) a.rstd[t * a.H + j] = rstd;
    for (int i = threadIdx.x; i < a.K; i += 32)
      y[i] = (to_float(head[i]) * rstd) * to_float(a.w[i]);
  } else {
    for (int i = threadIdx.x; i < a.K; i += 32) y[i] = to_float(head[i]);
  }
  __syncwarp();
  if (a.cos == nullptr) {
    for (int i = threadIdx.x; i < a.K; i += 32) out[i] = numerics::to_bf16(y[i]);
    return;
  }
  const int half = a.K / 2;
  const float* c = a.cos + table_row(a, t);
  const float* s = a.sin + table_row(a, t);
  for (int i = threadIdx.x; i < half; i += 32) {
    out[i] = numerics::to_bf16(numerics::fma(y[i], c[i], -(y[i + half] * s[i])));
    out[i + half] = numerics::to_bf16(numerics::fma(y[i + half], c[i], y[i] * s[i]));
  }
}

// Value i of the rotation's transpose on a head's gradient.
__device__ float turned_back(const Heads& a, const Bf16* d_out, std::int64_t table, int i) {
  if (a.cos == nullptr) return to_float(d_out[i]);
  const int half = a.K / 2;
  if (i < half)
    return numerics::fma(to_float(d_out[i]), a.cos[table + i],
                         to_float(d_out[i + half]) * a.sin[table + i]);
  return numerics::fma(to_float(d_out[i]), a.cos[table + i - half],
                       -(to_float(d_out[i - half]) * a.sin[table + i - half]));
}

__global__ void head_backward_any_kernel(Heads a) {
  const std::int64_t t = blockIdx.x / a.H, j = blockIdx.x % a.H;
  const std::int64_t table = a.cos != nullptr ? table_row(a, t) : 0;
  const Bf16* head = a.x + t * a.x_stride + j * a.K;
  const Bf16* d_out = a.d_out + (t * a.H + j) * a.K;
  Bf16* d_head = a.out + t * a.out_stride + j * a.K;
  if (a.w == nullptr) {
    for (int i = threadIdx.x; i < a.K; i += 32)
      d_head[i] = numerics::to_bf16(turned_back(a, d_out, table, i));
    return;
  }
  float acc = 0.0f;
  for (int i0 = threadIdx.x * 8; i0 < a.K; i0 += 256)
    for (int i = i0; i < min(i0 + 8, a.K); ++i)
      acc =
          numerics::fma(turned_back(a, d_out, table, i) * to_float(a.w[i]), to_float(head[i]), acc);
  const float rstd = a.rstd[t * a.H + j];
  const float factor = backward_factor(butterfly_sum(acc), rstd, a.K);
  for (int i = threadIdx.x; i < a.K; i += 32)
    d_head[i] = numerics::to_bf16(numerics::fma(
        -to_float(head[i]), factor, rstd * (turned_back(a, d_out, table, i) * to_float(a.w[i]))));
}

// A thread a column of d_w; blockIdx.y is the block of 128 tokens.
__global__ void head_weight_any_kernel(Heads a, float* partial_BK) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= a.K) return;
  const std::int64_t begin = std::int64_t{blockIdx.y} * numerics::kRowBlock;
  float acc = 0.0f;
  for (std::int64_t t = begin; t < min(begin + numerics::kRowBlock, a.T); ++t) {
    const std::int64_t table = a.cos != nullptr ? table_row(a, t) : 0;
    for (int j = 0; j < a.H; ++j) {
      const float v = to_float(a.x[t * a.x_stride + j * a.K + i]);
      const float dy = turned_back(a, a.d_out + (t * a.H + j) * a.K, table, i);
      acc = numerics::fma(dy, v * a.rstd[t * a.H + j], acc);
    }
  }
  partial_BK[std::int64_t{blockIdx.y} * a.K + i] = acc;
}

}  // namespace

void launch_head_any(const Heads& a, cudaStream_t stream) {
  const std::size_t shared = static_cast<std::size_t>(a.K) * sizeof(float);
  head_any_kernel<<<blocks_for(a.T * a.H, 1), 32, shared, stream>>>(a);
  LOCKSTEP_CUDA_LAUNCHED("head_norm_rope");
}

void launch_head_backward_any(const Heads& a, float* partial_BK, cudaStream_t stream) {
  if (partial_BK != nullptr) {  // before d_x, which may lie on the input
    const dim3 grid(blocks_for(a.K, 32), blocks_for(a.T, numerics::kRowBlock));
    head_weight_any_kernel<<<grid, 32, 0, stream>>>(a, partial_BK);
    LOCKSTEP_CUDA_LAUNCHED("head_norm_rope_backward: the weight's gradient");
  }
  head_backward_any_kernel<<<blocks_for(a.T * a.H, 1), 32, 0, stream>>>(a);
  LOCKSTEP_CUDA_LAUNCHED("head_norm_rope_backward");
}

}  // namespace lockstep::ops::cuda

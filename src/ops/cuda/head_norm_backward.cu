#include "ops/cuda/head_norm.cuh"
#include "ops/cuda/norm.h"

namespace lockstep::ops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTileValues = kThreads * 16;

// A thread's share of a head: chunks `pair` and `pair + kPairs`, which the rotation mixes.
struct Load {
  bool present;
  std::int64_t t;
  int j;
  uint4 d_low, d_high, x_low, x_high;
  float4 cos[2], sin[2];
  float rstd;
};

template <int kPairs>
__device__ Load load_head(const Heads& a, std::int64_t begin, int row, int rows, int pair) {
  Load l{};
  l.present = row < rows;
  if (!l.present) return l;
  l.t = begin + row / a.H;
  l.j = row % a.H;
  const auto* d_out = reinterpret_cast<const uint4*>(a.d_out + (l.t * a.H + l.j) * a.K) + pair;
  const auto* x = reinterpret_cast<const uint4*>(a.x + l.t * a.x_stride + l.j * a.K) + pair;
  l.d_low = d_out[0];
  l.d_high = d_out[kPairs];
  l.x_low = x[0];
  l.x_high = x[kPairs];
  l.rstd = a.rstd[l.t * a.H + l.j];
  if (a.cos != nullptr) {
    const std::int64_t at = table_row(a, l.t) + pair * 8;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      l.cos[i] = __ldg(reinterpret_cast<const float4*>(a.cos + at) + i);
      l.sin[i] = __ldg(reinterpret_cast<const float4*>(a.sin + at) + i);
    }
  }
  return l;
}

__device__ void spread(const float4 (&v)[2], float (&out)[8]) {
  out[0] = v[0].x, out[1] = v[0].y, out[2] = v[0].z, out[3] = v[0].w;
  out[4] = v[1].x, out[5] = v[1].y, out[6] = v[1].z, out[7] = v[1].w;
}

__device__ void store(float* to, const float (&v)[8]) {
  reinterpret_cast<float4*>(to)[0] = {v[0], v[1], v[2], v[3]};
  reinterpret_cast<float4*>(to)[1] = {v[4], v[5], v[6], v[7]};
}

// dy of one chunk pair, in place.
__device__ void turn_back(const Load& l, float (&low)[8], float (&high)[8]) {
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

__device__ float chunk_sum(const float (&dy)[8], const float (&w)[8], const float (&v)[8]) {
  float acc = 0.0f;
#pragma unroll
  for (int k = 0; k < 8; ++k) acc = numerics::fma(dy[k] * w[k], v[k], acc);
  return acc;
}

__device__ uint4 gradient(const float (&dy)[8], const float (&w)[8], const float (&v)[8],
                          float factor, float rstd) {
  float out[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) out[k] = numerics::fma(-v[k], factor, rstd * (dy[k] * w[k]));
  return pack(out);
}

// A block of 128 tokens. Tiles of rows (token, head): every thread turns its part of a row into dy
// and x * rstd in shared memory and writes d_x; then K threads, a column each, walk the tile's rows
// in order while the next tile's values are on their way.
template <int kPairs>
__global__ void __launch_bounds__(kThreads) head_backward_kernel(Heads a, float* partial_BK) {
  constexpr int K = 16 * kPairs, kRows = kThreads / kPairs;
  extern __shared__ float4 shared[];
  auto* stage = reinterpret_cast<float*>(shared);  // [2 buffers][dy, x * rstd][kRows][K]
  const int pair = threadIdx.x % kPairs, row = threadIdx.x / kPairs;
  const std::int64_t begin = std::int64_t{blockIdx.x} * numerics::kRowBlock;
  const int rows = static_cast<int>(min(std::int64_t{numerics::kRowBlock}, a.T - begin)) * a.H;
  const uint4 w_low = __ldg(reinterpret_cast<const uint4*>(a.w) + pair);
  const uint4 w_high = __ldg(reinterpret_cast<const uint4*>(a.w) + pair + kPairs);

  float column = 0.0f;
  Load l = load_head<kPairs>(a, begin, row, rows, pair);
  int buffer = 0;
  for (int first = 0; first < rows; first += kRows) {
    float* dy = stage + buffer * 2 * kTileValues;
    float* normed = dy + kTileValues;
    {
      float d_low[8], d_high[8], x_low[8], x_high[8], scale_low[8], scale_high[8];
      unpack(l.d_low, d_low);
      unpack(l.d_high, d_high);
      unpack(l.x_low, x_low);
      unpack(l.x_high, x_high);
      unpack(w_low, scale_low);
      unpack(w_high, scale_high);
      if (a.cos != nullptr) turn_back(l, d_low, d_high);
      float low = chunk_sum(d_low, scale_low, x_low), high = chunk_sum(d_high, scale_high, x_high);
      if (kPairs < 16) low = low + 0.0f, high = high + 0.0f;  // lanes of lane_sum without elements
      float sum = low + high;
#pragma unroll
      for (int d = kPairs / 2; d >= 1; d /= 2) sum = sum + __shfl_xor_sync(kFullWarp, sum, d);
      const float factor = backward_factor(sum, l.rstd, K);
      if (l.present) {
        auto* out = reinterpret_cast<uint4*>(a.out + l.t * a.out_stride + l.j * K) + pair;
        out[0] = gradient(d_low, scale_low, x_low, factor, l.rstd);
        out[kPairs] = gradient(d_high, scale_high, x_high, factor, l.rstd);
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) x_low[k] = x_low[k] * l.rstd, x_high[k] = x_high[k] * l.rstd;
      store(dy + row * K + pair * 8, d_low);
      store(dy + row * K + (pair + kPairs) * 8, d_high);
      store(normed + row * K + pair * 8, x_low);
      store(normed + row * K + (pair + kPairs) * 8, x_high);
    }
    __syncthreads();
    l = load_head<kPairs>(a, begin, first + kRows + row, rows, pair);
    if (threadIdx.x < K) {
      const float* dy_column = dy + threadIdx.x;
      const float* normed_column = normed + threadIdx.x;
      const int end = min(kRows, rows - first);
#pragma unroll 8
      for (int r = 0; r < end; ++r)
        column = numerics::fma(dy_column[r * K], normed_column[r * K], column);
    }
    buffer ^= 1;
  }
  if (threadIdx.x < K) partial_BK[std::int64_t{blockIdx.x} * K + threadIdx.x] = column;
}

template <int kPairs>
void launch_pairs(const Heads& a, float* partial_BK, cudaStream_t stream) {
  constexpr int kBytes = 4 * kTileValues * static_cast<int>(sizeof(float));
  tensor::check_cuda(cudaFuncSetAttribute(head_backward_kernel<kPairs>,
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
                     "head_norm_rope_backward: shared memory");
  head_backward_kernel<kPairs>
      <<<blocks_for(a.T, numerics::kRowBlock), kThreads, kBytes, stream>>>(a, partial_BK);
  LOCKSTEP_CUDA_LAUNCHED("head_norm_rope_backward");
}

}  // namespace

void launch_head_backward(const Heads& a, float* partial_BK, cudaStream_t stream) {
  switch (a.K) {
    case 16:
      return launch_pairs<1>(a, partial_BK, stream);
    case 32:
      return launch_pairs<2>(a, partial_BK, stream);
    case 64:
      return launch_pairs<4>(a, partial_BK, stream);
    case 128:
      return launch_pairs<8>(a, partial_BK, stream);
    default:
      return launch_pairs<16>(a, partial_BK, stream);
  }
}

void head_norm_rope_backward(const Context& ctx, const TensorView& d_out_THK, const HeadColumns& x,
                             const TensorView& w_K, const TensorView& positions_T,
                             const TensorView& cos_PK, const TensorView& sin_PK,
                             const TensorView& rstd_TH, const HeadColumns& d_x,
                             const TensorView& dw_K) {
  Heads a{};
  a.T = d_out_THK.dim(0);
  a.H = static_cast<int>(d_out_THK.dim(1));
  a.K = static_cast<int>(d_out_THK.dim(2));
  a.x = x.slab_TN.as<Bf16>() + x.column;
  a.x_stride = x.slab_TN.dim(1);
  a.d_out = d_out_THK.as<Bf16>();
  a.out = d_x.slab_TN.as<Bf16>() + d_x.column;
  a.out_stride = d_x.slab_TN.dim(1);
  if (cos_PK) {
    a.positions = positions_T.as<std::int32_t>();
    a.cos = cos_PK.as<float>();
    a.sin = sin_PK.as<float>();
    a.P = cos_PK.dim(0);
  }
  const cudaStream_t stream = stream_of(ctx);
  const bool empty = a.T == 0 || a.H == 0;
  if (!w_K) {
    if (empty) return;
    if (!head_in_chunks(a)) return launch_head_backward_any(a, nullptr, stream);
    a.x = a.d_out;
    a.x_stride = std::int64_t{a.H} * a.K;
    return launch_head_chunks(a, -1.0f, stream);
  }
  a.w = w_K.as<Bf16>();
  a.rstd = rstd_TH.as<float>();
  const tensor::ArenaScope scope(*ctx.workspace);
  const std::int64_t blocks = empty ? 0 : blocks_for(a.T, numerics::kRowBlock);
  float* partial = ctx.workspace->take(tensor::DType::kFp32, {blocks, a.K}).as<float>();
  const bool power_of_two = (a.K & (a.K - 1)) == 0;
  if (!empty && head_in_chunks(a) && a.K >= 16 && power_of_two)
    launch_head_backward(a, partial, stream);
  else if (!empty)
    launch_head_backward_any(a, partial, stream);
  add_row_blocks(ctx, partial, blocks, a.K, dw_K.as<float>());
}

}  // namespace lockstep::ops::cuda

#include "ops/cuda/norm.cuh"
#include "ops/cuda/norm.h"

namespace lockstep::ops::cuda {
namespace {

// Up to so many blocks of 128 rows, a block is not left to one thread block.
constexpr std::int64_t kFewBlocks = 64;

struct RmsNormBackward {
  std::int64_t T, D;
  const Bf16* dh;
  const Bf16* residual;  // dx may be residual
  const Bf16* x;
  const Bf16* w;
  const float* rstd;
  Bf16* dx;
};

// A block of 128 rows, read once: d_w needs the rows in order, d_x each row's sum over all columns.
// A warp holds 256 columns, a chunk a lane, and a lane's accumulator of the sum goes from warp to
// warp, a step each: in step s warp w adds its chunk of rows group s - w, and all warps finish the
// rows of group s - warps, whose sums are complete. A group is kRows rows.
template <int kRows, int kThreads>
__global__ void __launch_bounds__(kThreads)
    rms_norm_backward_kernel(RmsNormBackward a, float* partial_BD) {
  extern __shared__ float mail[];  // [2][warps][kRows][32]
  const int warps = static_cast<int>(blockDim.x / 32), warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32), chunks = static_cast<int>(a.D / 8);
  const bool present = static_cast<int>(threadIdx.x) < chunks;
  const std::int64_t begin = std::int64_t{blockIdx.x} * numerics::kRowBlock;
  const int rows = static_cast<int>(min(std::int64_t{numerics::kRowBlock}, a.T - begin));
  const int groups = (rows + kRows - 1) / kRows;
  const std::int64_t base = begin * chunks + threadIdx.x;
  const auto* dh = reinterpret_cast<const uint4*>(a.dh) + base;
  const auto* x = reinterpret_cast<const uint4*>(a.x) + base;
  const auto* residual =
      a.residual != nullptr ? reinterpret_cast<const uint4*>(a.residual) + base : nullptr;
  auto* dx = reinterpret_cast<uint4*>(a.dx) + base;
  const uint4 w = present ? __ldg(reinterpret_cast<const uint4*>(a.w) + threadIdx.x) : uint4{};

  struct Values {
    uint4 dh, x, residual;
    float rstd;
  };
  const auto here = [&](int group, int i) {
    return group >= 0 && group * kRows + i < rows;  // the same for a warp
  };
  Values adding[kRows], ending[kRows];
  const auto load_adding = [&](int group) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (here(group, i) && present) {
        const std::int64_t at = std::int64_t{group * kRows + i} * chunks;
        adding[i].dh = __ldg(dh + at);
        adding[i].x = __ldg(x + at);
      }
  };
  const auto load_ending = [&](int group) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (here(group, i) && present) {
        const std::int64_t at = std::int64_t{group * kRows + i} * chunks;
        ending[i].dh = __ldg(dh + at);
        ending[i].x = __ldg(x + at);
        if (residual != nullptr) ending[i].residual = residual[at];
        ending[i].rstd = __ldg(a.rstd + begin + group * kRows + i);
      }
  };

  float column[8] = {};
  load_adding(-warp);
  for (int s = 0; s < groups + warps; ++s) {
    const float* from = mail + (s + 1) % 2 * warps * kRows * 32 + lane;
    float* to = mail + s % 2 * warps * kRows * 32 + lane;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (here(s - warp, i)) {
        float acc = warp == 0 ? 0.0f : from[((warp - 1) * kRows + i) * 32];
        if (present) {
          float g[8], v[8], scale[8];
          unpack(adding[i].dh, g);
          unpack(adding[i].x, v);
          unpack(w, scale);
#pragma unroll
          for (int k = 0; k < 8; ++k) acc = numerics::fma(g[k] * scale[k], v[k], acc);
        }
        to[(warp * kRows + i) * 32] = acc;
      }
    load_adding(s + 1 - warp);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (here(s - warps, i)) {
        const float sum = butterfly_sum(from[((warps - 1) * kRows + i) * 32]);
        if (!present) continue;
        const float rstd = ending[i].rstd, factor = backward_factor(sum, rstd, a.D);
        float g[8], v[8], scale[8];
        unpack(ending[i].dh, g);
        unpack(ending[i].x, v);
        unpack(w, scale);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          column[k] = numerics::fma(g[k], v[k] * rstd, column[k]);
          g[k] = numerics::fma(-v[k], factor, rstd * (g[k] * scale[k]));
        }
        if (residual != nullptr) {
          unpack(ending[i].residual, v);
#pragma unroll
          for (int k = 0; k < 8; ++k) g[k] = g[k] + v[k];
        }
        dx[std::int64_t{(s - warps) * kRows + i} * chunks] = pack(g);
      }
    load_ending(s + 1 - warps);
    __syncthreads();
  }
  if (!present) return;
  auto* out =
      reinterpret_cast<float4*>(partial_BD + std::int64_t{blockIdx.x} * a.D) + 2 * threadIdx.x;
  out[0] = {column[0], column[1], column[2], column[3]};
  out[1] = {column[4], column[5], column[6], column[7]};
}

// Few rows, in two kernels, which read them twice but leave no multiprocessor idle. d_x: kWarps
// warps a row, as in the forward.
template <int kChunks, int kWarps>
__global__ void __launch_bounds__(kWarps == 1 ? 128 : 32 * kWarps)
    rms_norm_d_x_kernel(RmsNormBackward a) {
  const Row r = my_row<kWarps>(a.D);
  if (r.t >= a.T) return;
  const std::int64_t base = r.t * (a.D / 8);
  const auto* dh = reinterpret_cast<const uint4*>(a.dh) + base;
  const auto* x = reinterpret_cast<const uint4*>(a.x) + base;
  const auto* residual = reinterpret_cast<const uint4*>(a.residual) + base;
  const auto* w = reinterpret_cast<const uint4*>(a.w);
  auto* dx = reinterpret_cast<uint4*>(a.dx) + base;
  const float rstd = a.rstd[r.t];

  uint4 of_dh[kChunks], of_x[kChunks], of_w[kChunks], of_residual[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i)
    if (const int chunk = r.chunk + 32 * i; chunk < r.end) {
      of_dh[i] = __ldg(dh + chunk);
      of_x[i] = __ldg(x + chunk);
      of_w[i] = __ldg(w + chunk);
      if (a.residual != nullptr) of_residual[i] = residual[chunk];
    }
  const float sum = row_sum<kWarps>([&](float acc) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      if (r.chunk + 32 * i < r.end) {
        float g[8], v[8], scale[8];
        unpack(of_dh[i], g);
        unpack(of_x[i], v);
        unpack(of_w[i], scale);
#pragma unroll
        for (int k = 0; k < 8; ++k) acc = numerics::fma(g[k] * scale[k], v[k], acc);
      }
    return acc;
  });
  const float factor = backward_factor(sum, rstd, a.D);
#pragma unroll
  for (int i = 0; i < kChunks; ++i)
    if (const int chunk = r.chunk + 32 * i; chunk < r.end) {
      float g[8], v[8], scale[8];
      unpack(of_dh[i], g);
      unpack(of_x[i], v);
      unpack(of_w[i], scale);
#pragma unroll
      for (int k = 0; k < 8; ++k) g[k] = numerics::fma(-v[k], factor, rstd * (g[k] * scale[k]));
      if (a.residual != nullptr) {
        unpack(of_residual[i], v);
#pragma unroll
        for (int k = 0; k < 8; ++k) g[k] = g[k] + v[k];
      }
      dx[chunk] = pack(g);
    }
}

// The blocks' shares of d_w: a thread two columns of a block of 128 rows.
constexpr int kPairThreads = 64;
__global__ void __launch_bounds__(kPairThreads)
    row_block_pairs_kernel(RmsNormBackward a, float* partial_BD) {
  constexpr int kAtOnce = 32;  // rows on their way from memory
  const std::int64_t pairs = a.D / 2;
  const std::int64_t p = std::int64_t{blockIdx.x} * kPairThreads + threadIdx.x;
  if (p >= pairs) return;
  const std::int64_t begin = std::int64_t{blockIdx.y} * numerics::kRowBlock;
  const int rows = static_cast<int>(min(std::int64_t{numerics::kRowBlock}, a.T - begin));
  const auto* dh = reinterpret_cast<const std::uint32_t*>(a.dh) + begin * pairs + p;
  const auto* x = reinterpret_cast<const std::uint32_t*>(a.x) + begin * pairs + p;
  float low = 0.0f, high = 0.0f;
  for (int first = 0; first < rows; first += kAtOnce) {
    std::uint32_t of_dh[kAtOnce], of_x[kAtOnce];
    float rstd[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i < rows) {
        of_dh[i] = __ldg(dh + (first + i) * pairs);
        of_x[i] = __ldg(x + (first + i) * pairs);
        rstd[i] = __ldg(a.rstd + begin + first + i);
      }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i < rows) {
        float g[2], v[2];
        unpack_pair(of_dh[i], g[0], g[1]);
        unpack_pair(of_x[i], v[0], v[1]);
        low = numerics::fma(g[0], v[0] * rstd[i], low);
        high = numerics::fma(g[1], v[1] * rstd[i], high);
      }
  }
  reinterpret_cast<float2*>(partial_BD + blockIdx.y * a.D)[p] = {low, high};
}

// Any width and alignment: a warp a row, value by value.
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

// The same for d_w: a thread a column of a block of 128 rows.
__global__ void row_block_any_kernel(RmsNormBackward a, float* partial_BD) {
  const std::int64_t d = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (d >= a.D) return;
  const std::int64_t begin = std::int64_t{blockIdx.y} * numerics::kRowBlock;
  float acc = 0.0f;
#pragma unroll 8
  for (std::int64_t t = begin; t < min(begin + numerics::kRowBlock, a.T); ++t)
    acc = numerics::fma(numerics::to_float(a.dh[t * a.D + d]),
                        numerics::to_float(a.x[t * a.D + d]) * a.rstd[t], acc);
  partial_BD[blockIdx.y * a.D + d] = acc;
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

template <int kRows, int kThreads>
void launch_blocks(const RmsNormBackward& a, float* partial_BD, cudaStream_t stream) {
  const int warps = static_cast<int>((a.D + 255) / 256);
  const std::size_t shared = sizeof(float) * 2 * warps * kRows * 32;
  rms_norm_backward_kernel<kRows, kThreads>
      <<<blocks_for(a.T, numerics::kRowBlock), 32 * warps, shared, stream>>>(a, partial_BD);
}

void launch_few_rows(const RmsNormBackward& a, float* partial_BD, cudaStream_t stream) {
  const dim3 grid(blocks_for(a.D / 2, kPairThreads), blocks_for(a.T, numerics::kRowBlock));
  row_block_pairs_kernel<<<grid, kPairThreads, 0, stream>>>(a, partial_BD);
  LOCKSTEP_CUDA_LAUNCHED("rms_norm_backward: the weight's gradient");
  if (a.D <= 512)
    launch_rows<1>(a, rms_norm_d_x_kernel<2, 1>, stream);
  else if (a.D <= 2048)
    launch_rows<2>(a, rms_norm_d_x_kernel<4, 2>, stream);
  else if (a.D <= 4096)
    launch_rows<4>(a, rms_norm_d_x_kernel<4, 4>, stream);
  else
    launch_rows<8>(a, rms_norm_d_x_kernel<4, 8>, stream);
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
    if (!chunks || a.D > 8192) {
      const dim3 grid(blocks_for(a.D, 64), static_cast<unsigned>(blocks));
      row_block_any_kernel<<<grid, 64, 0, stream>>>(a, partial);
      LOCKSTEP_CUDA_LAUNCHED("rms_norm_backward: the weight's gradient");
      rms_norm_backward_any_kernel<<<static_cast<unsigned>(a.T), 32, 0, stream>>>(a);
    } else if (blocks <= kFewBlocks) {
      launch_few_rows(a, partial, stream);
    } else if (a.D <= 2048) {
      launch_blocks<4, 256>(a, partial, stream);
    } else if (a.D <= 4096) {
      launch_blocks<2, 512>(a, partial, stream);
    } else {
      launch_blocks<1, 1024>(a, partial, stream);
    }
    LOCKSTEP_CUDA_LAUNCHED("rms_norm_backward");
  }
  add_row_blocks(ctx, partial, blocks, a.D, dw_D.as<float>());
}

}  // namespace lockstep::ops::cuda

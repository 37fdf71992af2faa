// Norm and rotary embedding of columns of wider rows: value by value, so that any column and width
// will do. What they move is small beside the projections before and behind them.
#include "ops/cuda/columns.h"
#include "ops/cuda/norm.cuh"

namespace lockstep::ops::cuda {
namespace {

// Columns on the device: row t at data + t * row.
struct Slice {
  Bf16* data;
  std::int64_t row, stride;
  explicit Slice(const Columns& x)
      : data(x.slab_TN.as<Bf16>() + x.column), row(x.slab_TN.dim(1)), stride(x.stride) {}
};

struct ColumnNorm {
  std::int64_t T, D;
  Slice x, h;  // backward: h is d_h
  const Bf16* w;
  float* rstd;
  float eps;
};

constexpr int kRowsOfBlock = 4;  // a warp a row

__device__ inline std::int64_t warp_row() {
  return std::int64_t{blockIdx.x} * kRowsOfBlock + static_cast<int>(threadIdx.x) / 32;
}

// The lane's part of lane_sum.
template <typename Step>
__device__ inline float row_lane_sum(std::int64_t D, Step step) {
  float acc = 0.0f;
  for (std::int64_t d0 = threadIdx.x % 32 * 8; d0 < D; d0 += 256)
    for (std::int64_t d = d0; d < min(d0 + 8, D); ++d) acc = step(d, acc);
  return butterfly_sum(acc);
}

__global__ void rms_norm_columns_kernel(ColumnNorm a) {
  const std::int64_t t = warp_row();
  if (t >= a.T) return;
  const Bf16* x = a.x.data + t * a.x.row;
  Bf16* h = a.h.data + t * a.h.row;
  const float sum = row_lane_sum(a.D, [&](std::int64_t d, float acc) {
    const float v = numerics::to_float(x[d]);
    return numerics::fma(v, v, acc);
  });
  const float rstd = reciprocal_rms(sum, a.D, a.eps);
  if (threadIdx.x % 32 == 0) a.rstd[t] = rstd;
  for (std::int64_t d = threadIdx.x % 32; d < a.D; d += 32)
    h[d] = numerics::to_bf16((numerics::to_float(x[d]) * rstd) * numerics::to_float(a.w[d]));
}

// d_x may be d_h: the sum has read all of the row before any of it is written.
__global__ void rms_norm_columns_backward_kernel(ColumnNorm a, Slice d_x) {
  const std::int64_t t = warp_row();
  if (t >= a.T) return;
  const Bf16* x = a.x.data + t * a.x.row;
  const Bf16* dh = a.h.data + t * a.h.row;
  Bf16* dx = d_x.data + t * d_x.row;
  const float rstd = a.rstd[t];
  const float sum = row_lane_sum(a.D, [&](std::int64_t d, float acc) {
    return numerics::fma(numerics::to_float(dh[d]) * numerics::to_float(a.w[d]),
                         numerics::to_float(x[d]), acc);
  });
  const float factor = backward_factor(sum, rstd, a.D);
  __syncwarp();
  for (std::int64_t d = threadIdx.x % 32; d < a.D; d += 32)
    dx[d] = numerics::to_bf16(
        numerics::fma(-numerics::to_float(x[d]), factor,
                      rstd * (numerics::to_float(dh[d]) * numerics::to_float(a.w[d]))));
}

// A thread a column of a block of 128 rows.
__global__ void column_weight_kernel(ColumnNorm a, float* partial_BD) {
  const std::int64_t d = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (d >= a.D) return;
  const std::int64_t begin = std::int64_t{blockIdx.y} * numerics::kRowBlock;
  float acc = 0.0f;
#pragma unroll 8
  for (std::int64_t t = begin; t < min(begin + numerics::kRowBlock, a.T); ++t)
    acc = numerics::fma(numerics::to_float(a.h.data[t * a.h.row + d]),
                        numerics::to_float(a.x.data[t * a.x.row + d]) * a.rstd[t], acc);
  partial_BD[blockIdx.y * a.D + d] = acc;
}

struct Rotation {
  std::int64_t count, heads, half, positions;
  Slice from, to;
  const std::int32_t* position_T;
  const float *cos, *sin;
  std::int64_t step, other;  // of the pairs as they lie in x
};

// A thread a pair.
template <bool kBackward>
__global__ void rope_columns_kernel(Rotation a) {
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t n = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; n < a.count;
       n += stride) {
    const std::int64_t i = n % a.half, row = n / a.half, h = row % a.heads, t = row / a.heads;
    const std::int64_t at = clamp_index(a.position_T[t], a.positions) * a.half + i;
    const float c = a.cos[at], s = a.sin[at];
    const Bf16* from = a.from.data + t * a.from.row + h * a.from.stride;
    Bf16* to = a.to.data + t * a.to.row + h * a.to.stride;
    if (kBackward) {
      const float d1 = numerics::to_float(from[i]), d2 = numerics::to_float(from[i + a.half]);
      to[i * a.step] = numerics::to_bf16(numerics::fma(d1, c, d2 * s));
      to[i * a.step + a.other] = numerics::to_bf16(numerics::fma(d2, c, -(d1 * s)));
    } else {
      const float x1 = numerics::to_float(from[i * a.step]),
                  x2 = numerics::to_float(from[i * a.step + a.other]);
      to[i] = numerics::to_bf16(numerics::fma(x1, c, -(x2 * s)));
      to[i + a.half] = numerics::to_bf16(numerics::fma(x2, c, x1 * s));
    }
  }
}

template <bool kBackward>
void rotate(const Context& ctx, const Columns& from, std::int64_t heads, RopePairs pairs,
            const TensorView& positions_T, const TensorView& cos_PR, const TensorView& sin_PR,
            const Columns& to) {
  const std::int64_t half = cos_PR.dim(1), count = positions_T.dim(0) * heads * half;
  if (count == 0) return;
  const bool side_by_side = pairs == RopePairs::kInterleaved;
  const Rotation a{count,
                   heads,
                   half,
                   cos_PR.dim(0),
                   Slice(from),
                   Slice(to),
                   positions_T.as<std::int32_t>(),
                   cos_PR.as<float>(),
                   sin_PR.as<float>(),
                   side_by_side ? 2 : 1,
                   side_by_side ? 1 : half};
  const Grid grid = elementwise_grid(count);
  rope_columns_kernel<kBackward><<<grid.blocks, grid.threads, 0, stream_of(ctx)>>>(a);
  LOCKSTEP_CUDA_LAUNCHED("rope_columns");
}

}  // namespace

void rms_norm_columns(const Context& ctx, const Columns& x, const TensorView& w_D, float eps,
                      const Columns& h, const TensorView& rstd_T) {
  const ColumnNorm a{rstd_T.dim(0),  w_D.dim(0),         Slice(x), Slice(h),
                     w_D.as<Bf16>(), rstd_T.as<float>(), eps};
  if (a.T == 0) return;
  rms_norm_columns_kernel<<<blocks_for(a.T, kRowsOfBlock), 32 * kRowsOfBlock, 0, stream_of(ctx)>>>(
      a);
  LOCKSTEP_CUDA_LAUNCHED("rms_norm_columns");
}

void rms_norm_columns_backward(const Context& ctx, const Columns& d_h, const Columns& x,
                               const TensorView& w_D, const TensorView& rstd_T, const Columns& d_x,
                               const TensorView& dw_D) {
  const ColumnNorm a{rstd_T.dim(0),  w_D.dim(0),         Slice(x), Slice(d_h),
                     w_D.as<Bf16>(), rstd_T.as<float>(), 0.0f};
  const std::int64_t blocks = (a.T + numerics::kRowBlock - 1) / numerics::kRowBlock;
  const tensor::ArenaScope scope(*ctx.workspace);
  float* partial = ctx.workspace->take(tensor::DType::kFp32, {blocks, a.D}).as<float>();
  if (a.T > 0) {  // the weight's gradient first, because d_x may be d_h
    column_weight_kernel<<<dim3(blocks_for(a.D, 64), static_cast<unsigned>(blocks)), 64, 0,
                           stream_of(ctx)>>>(a, partial);
    LOCKSTEP_CUDA_LAUNCHED("rms_norm_columns_backward: the weight's gradient");
    rms_norm_columns_backward_kernel<<<blocks_for(a.T, kRowsOfBlock), 32 * kRowsOfBlock, 0,
                                       stream_of(ctx)>>>(a, Slice(d_x));
    LOCKSTEP_CUDA_LAUNCHED("rms_norm_columns_backward");
  }
  add_row_blocks(ctx, partial, blocks, a.D, dw_D.as<float>());
}

void rope_columns(const Context& ctx, const Columns& x, std::int64_t heads, RopePairs pairs,
                  const TensorView& positions_T, const TensorView& cos_PR, const TensorView& sin_PR,
                  const Columns& out) {
  rotate<false>(ctx, x, heads, pairs, positions_T, cos_PR, sin_PR, out);
}

void rope_columns_backward(const Context& ctx, const Columns& d_out, std::int64_t heads,
                           RopePairs pairs, const TensorView& positions_T, const TensorView& cos_PR,
                           const TensorView& sin_PR, const Columns& d_x) {
  rotate<true>(ctx, d_out, heads, pairs, positions_T, cos_PR, sin_PR, d_x);
}

}  // namespace lockstep::ops::cuda

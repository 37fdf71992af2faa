#include "ops/cpu/columns.h"

#include <algorithm>

#include "numerics/reduce.h"
#include "ops/cpu/rms.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {

namespace {

using numerics::Bf16;
using numerics::fma;
using numerics::kRowBlock;
using numerics::to_bf16;
using numerics::to_float;

template <typename T>
T* data(const TensorView& view) {
  return static_cast<T*>(view.data);
}

Bf16* row_of(const Columns& x, std::int64_t t) {
  return data<Bf16>(x.slab_TN) + t * x.slab_TN.dim(1) + x.column;
}

}  // namespace

void rms_norm_columns(const Context& ctx, const Columns& x, const TensorView& w_D, float eps,
                      const Columns& h, const TensorView& rstd_T) {
  const std::int64_t T = rstd_T.dim(0), D = w_D.dim(0);
  const Bf16* w = data<const Bf16>(w_D);
#pragma omp parallel for schedule(static) num_threads(ctx.threads)
  for (std::int64_t t = 0; t < T; ++t) {
    const Bf16* from = row_of(x, t);
    Bf16* to = row_of(h, t);
    const float rstd = reciprocal_rms(from, D, eps);
    data<float>(rstd_T)[t] = rstd;
    for (std::int64_t d = 0; d < D; ++d)
      to[d] = to_bf16((to_float(from[d]) * rstd) * to_float(w[d]));
  }
}

void rms_norm_columns_backward(const Context& ctx, const Columns& d_h, const Columns& x,
                               const TensorView& w_D, const TensorView& rstd_T, const Columns& d_x,
                               const TensorView& dw_D) {
  const std::int64_t T = rstd_T.dim(0), D = w_D.dim(0);
  const Bf16* w = data<const Bf16>(w_D);
  const float* rstd_all = data<const float>(rstd_T);
  float* dw = data<float>(dw_D);
#pragma omp parallel num_threads(ctx.threads)
  {
    // Columns of d_w in tiles; a tile's rows are walked in the contract's order by one thread.
    // First, because d_x may be d_h.
    constexpr std::int64_t kTile = 64;
#pragma omp for schedule(static)
    for (std::int64_t d0 = 0; d0 < D; d0 += kTile) {
      const std::int64_t n = std::min(kTile, D - d0);
      float total[kTile] = {};
      for (std::int64_t t0 = 0; t0 < T; t0 += kRowBlock) {
        float acc[kTile] = {};
        for (std::int64_t t = t0; t < std::min<std::int64_t>(T, t0 + kRowBlock); ++t) {
          const Bf16* dh = row_of(d_h, t) + d0;
          const Bf16* from = row_of(x, t) + d0;
          for (std::int64_t c = 0; c < n; ++c)
            acc[c] = fma(to_float(dh[c]), to_float(from[c]) * rstd_all[t], acc[c]);
        }
        for (std::int64_t c = 0; c < n; ++c) total[c] = total[c] + acc[c];
      }
      for (std::int64_t c = 0; c < n; ++c) dw[d0 + c] = dw[d0 + c] + total[c];
    }
#pragma omp for schedule(static)
    for (std::int64_t t = 0; t < T; ++t) {
      const Bf16* dh = row_of(d_h, t);
      const Bf16* from = row_of(x, t);
      Bf16* to = row_of(d_x, t);
      const float rstd = rstd_all[t];
      const float sum = numerics::lane_sum<float>(D, [=](std::int64_t i, float acc) {
        return fma(to_float(dh[i]) * to_float(w[i]), to_float(from[i]), acc);
      });
      const float k = rms_backward_factor(sum, rstd, D);
      for (std::int64_t d = 0; d < D; ++d)
        to[d] = to_bf16(fma(-to_float(from[d]), k, rstd * (to_float(dh[d]) * to_float(w[d]))));
    }
  }
}

void rope_columns(const Context& ctx, const Columns& x, std::int64_t heads, RopePairs pairs,
                  const TensorView& positions_T, const TensorView& cos_PR, const TensorView& sin_PR,
                  const Columns& out) {
  const std::int64_t T = positions_T.dim(0), half = cos_PR.dim(1);
  const std::int64_t step = pairs == RopePairs::kInterleaved ? 2 : 1;
  const std::int64_t other = pairs == RopePairs::kInterleaved ? 1 : half;
#pragma omp parallel for schedule(static) num_threads(ctx.threads)
  for (std::int64_t t = 0; t < T; ++t)
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t position = data<const std::int32_t>(positions_T)[t];
      const float* c = data<const float>(cos_PR) + position * half;
      const float* s = data<const float>(sin_PR) + position * half;
      const Bf16* from = row_of(x, t) + h * x.stride;
      Bf16* to = row_of(out, t) + h * out.stride;
      for (std::int64_t i = 0; i < half; ++i) {
        const float x1 = to_float(from[i * step]), x2 = to_float(from[i * step + other]);
        to[i] = to_bf16(fma(x1, c[i], -(x2 * s[i])));
        to[i + half] = to_bf16(fma(x2, c[i], x1 * s[i]));
      }
    }
}

void rope_columns_backward(const Context& ctx, const Columns& d_out, std::int64_t heads,
                           RopePairs pairs, const TensorView& positions_T, const TensorView& cos_PR,
                           const TensorView& sin_PR, const Columns& d_x) {
  const std::int64_t T = positions_T.dim(0), half = cos_PR.dim(1);
  const std::int64_t step = pairs == RopePairs::kInterleaved ? 2 : 1;
  const std::int64_t other = pairs == RopePairs::kInterleaved ? 1 : half;
#pragma omp parallel for schedule(static) num_threads(ctx.threads)
  for (std::int64_t t = 0; t < T; ++t)
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t position = data<const std::int32_t>(positions_T)[t];
      const float* c = data<const float>(cos_PR) + position * half;
      const float* s = data<const float>(sin_PR) + position * half;
      const Bf16* from = row_of(d_out, t) + h * d_out.stride;
      Bf16* to = row_of(d_x, t) + h * d_x.stride;
      for (std::int64_t i = 0; i < half; ++i) {
        const float d1 = to_float(from[i]), d2 = to_float(from[i + half]);
        to[i * step] = to_bf16(fma(d1, c[i], d2 * s[i]));
        to[i * step + other] = to_bf16(fma(d2, c[i], -(d1 * s[i])));
      }
    }
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA

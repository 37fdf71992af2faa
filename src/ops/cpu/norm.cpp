#include "ops/cpu/norm.h"

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

}  // namespace

void rms_norm(const Context& ctx, const TensorView& x_TD, const TensorView& delta_TD,
              const TensorView& w_D, float eps, const TensorView& x_out_TD, const TensorView& h_TD,
              const TensorView& rstd_T) {
  const std::int64_t T = x_TD.dim(0), D = x_TD.dim(1);
  const Bf16* w = data<const Bf16>(w_D);
#pragma omp parallel for schedule(static) num_threads(ctx.threads)
  for (std::int64_t t = 0; t < T; ++t) {
    const Bf16* x = data<const Bf16>(x_TD) + t * D;
    Bf16* x_out = data<Bf16>(x_out_TD) + t * D;
    Bf16* h = data<Bf16>(h_TD) + t * D;
    if (delta_TD) {
      const Bf16* delta = data<const Bf16>(delta_TD) + t * D;
      for (std::int64_t d = 0; d < D; ++d) x_out[d] = to_bf16(to_float(x[d]) + to_float(delta[d]));
    } else if (x_out != x) {
      for (std::int64_t d = 0; d < D; ++d) x_out[d] = x[d];
    }
    const float rstd = reciprocal_rms(x_out, D, eps);
    data<float>(rstd_T)[t] = rstd;
    for (std::int64_t d = 0; d < D; ++d)
      h[d] = to_bf16((to_float(x_out[d]) * rstd) * to_float(w[d]));
  }
}

void rms_norm_backward(const Context& ctx, const TensorView& dh_TD, const TensorView& d_residual_TD,
                       const TensorView& x_TD, const TensorView& w_D, const TensorView& rstd_T,
                       const TensorView& dx_TD, const TensorView& dw_D) {
  const std::int64_t T = x_TD.dim(0), D = x_TD.dim(1);
  const Bf16* dh_all = data<const Bf16>(dh_TD);
  const Bf16* x_all = data<const Bf16>(x_TD);
  const Bf16* w = data<const Bf16>(w_D);
  const float* rstd_all = data<const float>(rstd_T);
  float* dw = data<float>(dw_D);
#pragma omp parallel num_threads(ctx.threads)
  {
#pragma omp for schedule(static)
    for (std::int64_t t = 0; t < T; ++t) {
      const Bf16* dh = dh_all + t * D;
      const Bf16* x = x_all + t * D;
      const Bf16* residual = d_residual_TD ? data<const Bf16>(d_residual_TD) + t * D : nullptr;
      Bf16* dx = data<Bf16>(dx_TD) + t * D;
      const float rstd = rstd_all[t];
      const float sum = numerics::lane_sum<float>(D, [=](std::int64_t i, float acc) {
        return fma(to_float(dh[i]) * to_float(w[i]), to_float(x[i]), acc);
      });
      const float k = rms_backward_factor(sum, rstd, D);
      const auto gradient = [=](std::int64_t d) {
        return fma(-to_float(x[d]), k, rstd * (to_float(dh[d]) * to_float(w[d])));
      };
      if (residual != nullptr) {
        for (std::int64_t d = 0; d < D; ++d) dx[d] = to_bf16(gradient(d) + to_float(residual[d]));
      } else {
        for (std::int64_t d = 0; d < D; ++d) dx[d] = to_bf16(gradient(d));
      }
    }
    // Columns of d_w in tiles; a tile's rows are walked in the contract's order by one thread.
    constexpr std::int64_t kTile = 64;
#pragma omp for schedule(static)
    for (std::int64_t d0 = 0; d0 < D; d0 += kTile) {
      const std::int64_t n = std::min(kTile, D - d0);
      float total[kTile] = {};
      for (std::int64_t t0 = 0; t0 < T; t0 += kRowBlock) {
        float acc[kTile] = {};
        for (std::int64_t t = t0; t < std::min<std::int64_t>(T, t0 + kRowBlock); ++t) {
          const Bf16* dh = dh_all + t * D + d0;
          const Bf16* x = x_all + t * D + d0;
          const float rstd = rstd_all[t];
          for (std::int64_t c = 0; c < n; ++c)
            acc[c] = fma(to_float(dh[c]), to_float(x[c]) * rstd, acc[c]);
        }
        for (std::int64_t c = 0; c < n; ++c) total[c] = total[c] + acc[c];
      }
      for (std::int64_t c = 0; c < n; ++c) dw[d0 + c] = dw[d0 + c] + total[c];
    }
  }
}

void head_norm_rope(const Context& ctx, const HeadColumns& x, const TensorView& w_K, float eps,
                    const TensorView& positions_T, const TensorView& cos_PK,
                    const TensorView& sin_PK, const TensorView& rstd_TH,
                    const TensorView& out_THK) {
  const std::int64_t T = out_THK.dim(0), H = out_THK.dim(1), K = out_THK.dim(2), half = K / 2;
  const std::int64_t stride = x.slab_TN.dim(1);
  const bool norm = static_cast<bool>(w_K), rotate = static_cast<bool>(cos_PK);
  const Bf16* w = data<const Bf16>(w_K);
#pragma omp parallel for schedule(static) num_threads(ctx.threads)
  for (std::int64_t t = 0; t < T; ++t)
    for (std::int64_t j = 0; j < H; ++j) {
      const Bf16* head = data<const Bf16>(x.slab_TN) + t * stride + x.column + j * K;
      Bf16* out = data<Bf16>(out_THK) + (t * H + j) * K;
      float y[kMaxHeadWidth];
      if (norm) {
        const float rstd = reciprocal_rms(head, K, eps);
        data<float>(rstd_TH)[t * H + j] = rstd;
        for (std::int64_t i = 0; i < K; ++i) y[i] = (to_float(head[i]) * rstd) * to_float(w[i]);
      } else {
        for (std::int64_t i = 0; i < K; ++i) y[i] = to_float(head[i]);
      }
      if (!rotate) {
        for (std::int64_t i = 0; i < K; ++i) out[i] = to_bf16(y[i]);
        continue;
      }
      const std::int64_t position = data<const std::int32_t>(positions_T)[t];
      const float* c = data<const float>(cos_PK) + position * half;
      const float* s = data<const float>(sin_PK) + position * half;
      for (std::int64_t i = 0; i < half; ++i) {
        out[i] = to_bf16(fma(y[i], c[i], -(y[i + half] * s[i])));
        out[i + half] = to_bf16(fma(y[i + half], c[i], y[i] * s[i]));
      }
    }
}

void head_norm_rope_backward(const Context& ctx, const TensorView& d_out_THK, const HeadColumns& x,
                             const TensorView& w_K, const TensorView& positions_T,
                             const TensorView& cos_PK, const TensorView& sin_PK,
                             const TensorView& rstd_TH, const HeadColumns& d_x,
                             const TensorView& dw_K) {
  const std::int64_t T = d_out_THK.dim(0), H = d_out_THK.dim(1), K = d_out_THK.dim(2);
  const std::int64_t half = K / 2, blocks = (T + kRowBlock - 1) / kRowBlock;
  const std::int64_t stride = x.slab_TN.dim(1), d_stride = d_x.slab_TN.dim(1);
  const bool norm = static_cast<bool>(w_K), rotate = static_cast<bool>(cos_PK);
  const Bf16* w = data<const Bf16>(w_K);
  const tensor::ArenaScope scope(*ctx.workspace);
  // A block's share of d_w.
  float* partial =
      norm ? data<float>(ctx.workspace->take(tensor::DType::kFp32, {blocks, K})) : nullptr;
#pragma omp parallel for schedule(static) num_threads(ctx.threads)
  for (std::int64_t b = 0; b < blocks; ++b) {
    float acc[kMaxHeadWidth] = {};
    const std::int64_t end = std::min<std::int64_t>(T, (b + 1) * kRowBlock);
    for (std::int64_t t = b * kRowBlock; t < end; ++t)
      for (std::int64_t j = 0; j < H; ++j) {
        const Bf16* d_out = data<const Bf16>(d_out_THK) + (t * H + j) * K;
        const Bf16* head = data<const Bf16>(x.slab_TN) + t * stride + x.column + j * K;
        Bf16* d_head = data<Bf16>(d_x.slab_TN) + t * d_stride + d_x.column + j * K;
        float dy[kMaxHeadWidth];
        if (rotate) {
          const std::int64_t position = data<const std::int32_t>(positions_T)[t];
          const float* c = data<const float>(cos_PK) + position * half;
          const float* s = data<const float>(sin_PK) + position * half;
          for (std::int64_t i = 0; i < half; ++i) {
            const float d1 = to_float(d_out[i]), d2 = to_float(d_out[i + half]);
            dy[i] = fma(d1, c[i], d2 * s[i]);
            dy[i + half] = fma(d2, c[i], -(d1 * s[i]));
          }
        } else {
          for (std::int64_t i = 0; i < K; ++i) dy[i] = to_float(d_out[i]);
        }
        if (!norm) {
          for (std::int64_t i = 0; i < K; ++i) d_head[i] = to_bf16(dy[i]);
          continue;
        }
        const float rstd = data<const float>(rstd_TH)[t * H + j];
        const float sum = numerics::lane_sum<float>(K, [&](std::int64_t i, float a) {
          return fma(dy[i] * to_float(w[i]), to_float(head[i]), a);
        });
        const float k = rms_backward_factor(sum, rstd, K);
        for (std::int64_t i = 0; i < K; ++i) {
          const float v = to_float(head[i]);
          acc[i] = fma(dy[i], v * rstd, acc[i]);
          d_head[i] = to_bf16(fma(-v, k, rstd * (dy[i] * to_float(w[i]))));
        }
      }
    if (norm)
      for (std::int64_t i = 0; i < K; ++i) partial[b * K + i] = acc[i];
  }
  if (!norm) return;
  float* dw = data<float>(dw_K);
  for (std::int64_t i = 0; i < K; ++i) {
    float total = 0.0f;
    for (std::int64_t b = 0; b < blocks; ++b) total = total + partial[b * K + i];
    dw[i] = dw[i] + total;
  }
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA

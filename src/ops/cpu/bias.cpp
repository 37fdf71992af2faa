#include "ops/cpu/bias.h"

#include <algorithm>

#include "numerics/reduce.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {

using numerics::Bf16;
using numerics::kRowBlock;
using numerics::to_bf16;
using numerics::to_float;

void add_bias(const Context& ctx, const TensorView& x_TN, const TensorView& bias_N,
              const TensorView& out_TN) {
  const std::int64_t T = x_TN.dim(0), N = x_TN.dim(1);
  const Bf16* bias = bias_N.as<Bf16>();
#pragma omp parallel for schedule(static) num_threads(ctx.threads)
  for (std::int64_t t = 0; t < T; ++t) {
    const float* x = x_TN.as<float>() + t * N;
    Bf16* out = out_TN.as<Bf16>() + t * N;
    for (std::int64_t n = 0; n < N; ++n) out[n] = to_bf16(x[n] + to_float(bias[n]));
  }
}

// Columns in tiles; a tile's rows are walked in the contract's order by one thread.
void bias_backward(const Context& ctx, const TensorView& dy_TN, const TensorView& d_bias_N) {
  const std::int64_t T = dy_TN.dim(0), N = dy_TN.dim(1);
  float* d_bias = d_bias_N.as<float>();
  constexpr std::int64_t kTile = 64;
#pragma omp parallel for schedule(static) num_threads(ctx.threads)
  for (std::int64_t n0 = 0; n0 < N; n0 += kTile) {
    const std::int64_t n = std::min(kTile, N - n0);
    float total[kTile] = {};
    for (std::int64_t t0 = 0; t0 < T; t0 += kRowBlock) {
      float acc[kTile] = {};
      for (std::int64_t t = t0; t < std::min<std::int64_t>(T, t0 + kRowBlock); ++t) {
        const Bf16* dy = dy_TN.as<Bf16>() + t * N + n0;
        for (std::int64_t c = 0; c < n; ++c) acc[c] = acc[c] + to_float(dy[c]);
      }
      for (std::int64_t c = 0; c < n; ++c) total[c] = total[c] + acc[c];
    }
    for (std::int64_t c = 0; c < n; ++c) d_bias[n0 + c] = d_bias[n0 + c] + total[c];
  }
}

void clip(const Context& ctx, const TensorView& x, Bf16 limit) {
  const std::int64_t n = x.count();
  Bf16* value = x.as<Bf16>();
  const Bf16 low = to_bf16(-to_float(limit));
#pragma omp parallel for schedule(static) num_threads(ctx.threads)
  for (std::int64_t i = 0; i < n; ++i) {
    const float v = to_float(value[i]);
    if (v > to_float(limit)) value[i] = limit;
    if (v < to_float(low)) value[i] = low;
  }
}

void clip_backward(const Context& ctx, const TensorView& x, Bf16 limit, const TensorView& d) {
  const std::int64_t n = x.count();
  const Bf16* value = x.as<Bf16>();
  Bf16* gradient = d.as<Bf16>();
  const float bound = to_float(limit);
#pragma omp parallel for schedule(static) num_threads(ctx.threads)
  for (std::int64_t i = 0; i < n; ++i) {
    const float v = to_float(value[i]);
    if (v >= bound || v <= -bound) gradient[i] = Bf16{0};
  }
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA

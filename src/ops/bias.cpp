#include "ops/bias.h"

#include "ops/cpu/bias.h"
#include "ops/cuda/bias.h"
#include "ops/cuda/call.h"

namespace lockstep::ops {

using tensor::DType;
using tensor::require;

void add_bias(const Context& ctx, const TensorView& x_TN, const TensorView& bias_N,
              const TensorView& out_TN) {
  require(x_TN, DType::kFp32, {-1, -1}, "add_bias: x");
  require(bias_N, DType::kBf16, {x_TN.dim(1)}, "add_bias: bias");
  require(out_TN, DType::kBf16, x_TN.shape, "add_bias: out");
  LOCKSTEP_CUDA_CALL(ctx, add_bias, ctx, x_TN, bias_N, out_TN);
  LOCKSTEP_CPU_CALL(ctx, add_bias, ctx, x_TN, bias_N, out_TN);
}

void bias_backward(const Context& ctx, const TensorView& dy_TN, const TensorView& d_bias_N) {
  require(dy_TN, DType::kBf16, {-1, -1}, "bias_backward: dy");
  require(d_bias_N, DType::kFp32, {dy_TN.dim(1)}, "bias_backward: d_bias");
  LOCKSTEP_CUDA_CALL(ctx, bias_backward, ctx, dy_TN, d_bias_N);
  LOCKSTEP_CPU_CALL(ctx, bias_backward, ctx, dy_TN, d_bias_N);
}

namespace {

void check_clip(const TensorView& x, numerics::Bf16 limit) {
  LOCKSTEP_CHECK(x.dtype == DType::kBf16, "clip: {}", tensor::dtype_name(x.dtype));
  const float bound = numerics::to_float(limit);
  LOCKSTEP_CHECK(bound > 0, "clip: limit {}", bound);
}

}  // namespace

void clip(const Context& ctx, const TensorView& x, numerics::Bf16 limit) {
  check_clip(x, limit);
  LOCKSTEP_CUDA_CALL(ctx, clip, ctx, x, limit);
  LOCKSTEP_CPU_CALL(ctx, clip, ctx, x, limit);
}

void clip_backward(const Context& ctx, const TensorView& x, numerics::Bf16 limit,
                   const TensorView& d) {
  check_clip(x, limit);
  LOCKSTEP_CHECK(d.dtype == DType::kBf16 && d.count() == x.count(), "clip_backward: d {} {}",
                 tensor::dtype_name(d.dtype), d.shape.text());
  LOCKSTEP_CUDA_CALL(ctx, clip_backward, ctx, x, limit, d);
  LOCKSTEP_CPU_CALL(ctx, clip_backward, ctx, x, limit, d);
}

}  // namespace lockstep::ops

// AdamW, gradient norm and finite checks (docs/numerics.md, section 13).
#pragma once

#include <vector>

#include "ops/operand.h"

namespace lockstep::ops {

struct AdamwOptions {
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
  std::int64_t step = 1;  // counts from 1
  float clip = 1.0f;      // factor on the gradient
};

// grad, master FP32; m, v FP32 or BF16; w BF16: all of one count. Updates master, m, v and writes w
// = bf16(master). ContractError on options outside their range (step < 1, betas outside [0, 1), eps
// <= 0, a clip that is negative or not finite).
void adamw(const Context& ctx, const TensorView& grad, const AdamwOptions& options,
           const TensorView& master, const TensorView& m, const TensorView& v, const TensorView& w);

// Square root of the sum of squares of all tensors (FP32), in the order of section 13. NaN if any
// value is NaN, inf if any is infinite.
double global_norm(const Context& ctx, const std::vector<TensorView>& grads);

// The factor that brings a norm down to max_norm (1 when it is below, or max_norm <= 0; NaN for a
// NaN norm).
float clip_factor(double norm, double max_norm);

// Number of NaN or infinite values; FP32 or BF16.
std::int64_t count_nonfinite(const Context& ctx, const TensorView& x);

}  // namespace lockstep::ops

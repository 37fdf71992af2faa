#include "ops/optimizer.h"

#include <algorithm>
#include <cmath>

#include "ops/cpu/optimizer.h"
#include "ops/cuda/call.h"
#include "ops/cuda/optimizer.h"

namespace lockstep::ops {

using tensor::DType;

namespace {

// FP32, or where `half_too` BF16, of n values.
void require_values(const TensorView& x, std::int64_t n, bool half_too, const char* name) {
  const bool type = x.dtype == DType::kFp32 || (half_too && x.dtype == DType::kBf16);
  LOCKSTEP_CHECK(type && x.count() == n, "{}: expected fp32{} with {} values, got {} {}", name,
                 half_too ? " or bf16" : "", n, tensor::dtype_name(x.dtype), x.shape.text());
}

}  // namespace

void adamw(const Context& ctx, const TensorView& grad, const AdamwOptions& options,
           const TensorView& master, const TensorView& m, const TensorView& v,
           const TensorView& w) {
  const std::int64_t n = grad.count();
  require_values(grad, n, false, "adamw: grad");
  require_values(master, n, false, "adamw: master");
  require_values(m, n, true, "adamw: m");
  require_values(v, n, true, "adamw: v");
  LOCKSTEP_CHECK(w.dtype == DType::kBf16 && w.count() == n,
                 "adamw: w: expected bf16 with {} values, got {} {}", n,
                 tensor::dtype_name(w.dtype), w.shape.text());
  const AdamwOptions& o = options;
  LOCKSTEP_CHECK(o.step >= 1, "adamw: step {} (they count from 1)", o.step);
  LOCKSTEP_CHECK(o.beta1 >= 0 && o.beta1 < 1 && o.beta2 >= 0 && o.beta2 < 1,
                 "adamw: betas {} and {} are not in [0, 1)", o.beta1, o.beta2);
  LOCKSTEP_CHECK(std::isfinite(o.lr) && o.eps > 0 && std::isfinite(o.weight_decay) &&
                     std::isfinite(o.clip) && o.clip >= 0,
                 "adamw: lr {}, eps {}, weight decay {}, clip {}", o.lr, o.eps, o.weight_decay,
                 o.clip);
  const auto t = static_cast<double>(o.step);
  const AdamwFactors factors{static_cast<float>(o.lr),
                             static_cast<float>(o.beta1),
                             static_cast<float>(o.beta2),
                             static_cast<float>(o.eps),
                             static_cast<float>(o.lr * o.weight_decay),
                             static_cast<float>(1.0 / (1.0 - std::pow(o.beta1, t))),
                             static_cast<float>(1.0 / (1.0 - std::pow(o.beta2, t))),
                             o.clip};
  LOCKSTEP_CUDA_CALL(ctx, adamw, ctx, grad, factors, master, m, v, w);
  LOCKSTEP_CPU_CALL(ctx, adamw, ctx, grad, factors, master, m, v, w);
}

double global_norm(const Context& ctx, const std::vector<TensorView>& grads) {
  for (const TensorView& grad : grads) require_values(grad, grad.count(), false, "global_norm");
  LOCKSTEP_CUDA_CALL(ctx, global_norm, ctx, grads);
  return std::sqrt(LOCKSTEP_CPU_CALL(ctx, sum_of_squares, ctx, grads.data(),
                                     static_cast<std::int64_t>(grads.size())));
}

float clip_factor(double norm, double max_norm) {
  LOCKSTEP_CHECK(!std::isnan(max_norm), "clip_factor: the largest norm is NaN");
  if (max_norm <= 0) return 1.0f;
  const double factor = max_norm / (norm + 1e-6);
  return static_cast<float>(factor > 1.0 ? 1.0 : factor);
}

std::int64_t count_nonfinite(const Context& ctx, const TensorView& x) {
  require_values(x, x.count(), true, "count_nonfinite");
  LOCKSTEP_CUDA_CALL(ctx, count_nonfinite, ctx, x);
  return LOCKSTEP_CPU_CALL(ctx, count_nonfinite, ctx, x);
}

}  // namespace lockstep::ops

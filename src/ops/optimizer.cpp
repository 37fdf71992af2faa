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
void require_values(const TensorView& x, std::int64_t n, bool half_too, const char* op,
                    const char* name) {
  const bool type = x.dtype == DType::kFp32 || (half_too && x.dtype == DType::kBf16);
  LOCKSTEP_CHECK(type && x.count() == n, "{}{}: expected fp32{} with {} values, got {} {}", op,
                 name, half_too ? " or bf16" : "", n, tensor::dtype_name(x.dtype), x.shape.text());
}

}  // namespace

void require_adamw(const TensorView& grad, const TensorView& master, const TensorView& m,
                   const TensorView& v, const TensorView& w, const char* op) {
  const std::int64_t n = grad.count();
  require_values(grad, n, false, op, ": grad");
  require_values(master, n, false, op, ": master");
  require_values(m, n, true, op, ": m");
  require_values(v, n, true, op, ": v");
  LOCKSTEP_CHECK(w.dtype == DType::kBf16 && w.count() == n,
                 "{}: w: expected bf16 with {} values, got {} {}", op, n,
                 tensor::dtype_name(w.dtype), w.shape.text());
}

AdamwFactors adamw_factors(const AdamwOptions& o, const char* op) {
  LOCKSTEP_CHECK(o.step >= 1, "{}: step {} (they count from 1)", op, o.step);
  LOCKSTEP_CHECK(o.beta1 >= 0 && o.beta1 < 1 && o.beta2 >= 0 && o.beta2 < 1,
                 "{}: betas {} and {} are not in [0, 1)", op, o.beta1, o.beta2);
  LOCKSTEP_CHECK(std::isfinite(o.lr) && o.eps > 0 && std::isfinite(o.weight_decay) &&
                     std::isfinite(o.clip) && o.clip >= 0,
                 "{}: lr {}, eps {}, weight decay {}, clip {}", op, o.lr, o.eps, o.weight_decay,
                 o.clip);
  const auto t = static_cast<double>(o.step);
  return {static_cast<float>(o.lr),
          static_cast<float>(o.beta1),
          static_cast<float>(o.beta2),
          static_cast<float>(o.eps),
          static_cast<float>(o.lr * o.weight_decay),
          static_cast<float>(1.0 / (1.0 - std::pow(o.beta1, t))),
          static_cast<float>(1.0 / (1.0 - std::pow(o.beta2, t))),
          o.clip};
}

void adamw(const Context& ctx, const TensorView& grad, const AdamwOptions& options,
           const TensorView& master, const TensorView& m, const TensorView& v,
           const TensorView& w) {
  require_adamw(grad, master, m, v, w, "adamw");
  const AdamwFactors factors = adamw_factors(options, "adamw");
  LOCKSTEP_CUDA_CALL(ctx, adamw, ctx, grad, factors, master, m, v, w);
  LOCKSTEP_CPU_CALL(ctx, adamw, ctx, grad, factors, master, m, v, w);
}

double global_norm(const Context& ctx, const std::vector<TensorView>& grads) {
  for (const TensorView& grad : grads) require_values(grad, grad.count(), false, "global_norm", "");
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
  require_values(x, x.count(), true, "count_nonfinite", "");
  LOCKSTEP_CUDA_CALL(ctx, count_nonfinite, ctx, x);
  return LOCKSTEP_CPU_CALL(ctx, count_nonfinite, ctx, x);
}

}  // namespace lockstep::ops

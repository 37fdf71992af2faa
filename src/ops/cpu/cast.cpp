#include "ops/cpu/cast.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {

using numerics::Bf16;

void cast(const Context& ctx, const TensorView& from, const TensorView& to) {
  const std::int64_t n = from.count();
  if (from.dtype == tensor::DType::kBf16) {
    const Bf16* x = from.as<Bf16>();
    float* y = to.as<float>();
#pragma omp parallel for simd schedule(static) num_threads(ctx.threads)
    for (std::int64_t i = 0; i < n; ++i) y[i] = numerics::to_float(x[i]);
  } else {
    const float* x = from.as<float>();
    Bf16* y = to.as<Bf16>();
#pragma omp parallel for simd schedule(static) num_threads(ctx.threads)
    for (std::int64_t i = 0; i < n; ++i) y[i] = numerics::to_bf16(x[i]);
  }
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA

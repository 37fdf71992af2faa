#include "ops/adamw_quantize.h"

#include "ops/check.h"
#include "ops/cuda/adamw_quantize.h"
#include "ops/cuda/call.h"

namespace lockstep::ops {

using tensor::DType;
using tensor::require;

void adamw_quantize(const Context& ctx, const TensorView& grad, const AdamwOptions& options,
                    const TensorView& master, const TensorView& m, const TensorView& v,
                    const TensorView& w, bool pow2, const Fp8Weight& out, const Fp8Weight& out_t,
                    QuantStats* stats) {
  require(w, DType::kBf16, {-1, -1, -1}, "adamw_quantize: w");
  const std::int64_t E = w.dim(0), N = w.dim(1), K = w.dim(2);
  require_adamw(grad, master, m, v, w, "adamw_quantize");
  const AdamwFactors factors = adamw_factors(options, "adamw_quantize");
  LOCKSTEP_CHECK(
      out.scaling == Scaling::kBlock && (!out_t.codes_ENK || out_t.scaling == Scaling::kBlock),
      "adamw_quantize: the outputs are not scaled in blocks");
  require_weight(out, E, N, K, "adamw_quantize: out");
  if (out_t.codes_ENK) require_weight(out_t, E, K, N, "adamw_quantize: out_t");
  LOCKSTEP_CUDA_CALL(ctx, adamw_quantize, ctx, grad, factors, master, m, v, w, pow2, out, out_t,
                     stats);
  adamw(ctx, grad, options, master, m, v, w);
  quantize_weight(ctx, w, WeightScales::kBlock128, pow2, {}, out, out_t, stats);
}

}  // namespace lockstep::ops

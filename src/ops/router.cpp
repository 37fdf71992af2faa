#include "ops/router.h"

#include "ops/cpu/router.h"
#include "ops/cuda/call.h"
#include "ops/cuda/router.h"

namespace lockstep::ops {

namespace {

using tensor::DType;

void check_options(const Context& ctx, const RouterOptions& options, std::int64_t E) {
  LOCKSTEP_CHECK(E >= 1, "router: no experts");
  LOCKSTEP_CHECK(ctx.device == tensor::Device::kCpu || E <= cuda::kMaxExperts,
                 "router: {} experts, the GPU takes at most {}", E, cuda::kMaxExperts);
  LOCKSTEP_CHECK(options.groups >= 1 && E % options.groups == 0,
                 "router: {} experts do not divide into {} groups", E, options.groups);
  LOCKSTEP_CHECK(options.top_groups >= 1 && options.top_groups <= options.groups,
                 "router: top_groups {} of {} groups", options.top_groups, options.groups);
  const std::int64_t candidates = E / options.groups * options.top_groups;
  LOCKSTEP_CHECK(options.top_k >= 1 && options.top_k <= candidates,
                 "router: top_k {} of {} experts that take part", options.top_k, candidates);
}

cpu::RouterShape shape_with_scratch(const Context& ctx, const TensorView& logits_TE,
                                    const RouterOptions& options) {
  const std::int64_t E = logits_TE.dim(1);
  cpu::RouterShape shape{logits_TE.dim(0), E, ctx.threads, nullptr, nullptr};
  const TensorView rows =
      ctx.workspace->take(DType::kFp32, {ctx.threads * cpu::kRouterRows, cpu::router_row(E)});
  const TensorView keys = ctx.workspace->take(DType::kInt64, {ctx.threads, E + options.groups});
  shape.rows = rows.as<float>();
  shape.keys = reinterpret_cast<std::uint64_t*>(keys.as<std::int64_t>());
  return shape;
}

}  // namespace

void router(const Context& ctx, const TensorView& logits_TE, const TensorView& bias_E,
            const RouterOptions& options, const TensorView& weights_TC,
            const TensorView& experts_TC) {
  tensor::require(logits_TE, DType::kFp32, {-1, -1}, "router: logits_TE");
  const std::int64_t T = logits_TE.dim(0), E = logits_TE.dim(1);
  check_options(ctx, options, E);
  if (bias_E) tensor::require(bias_E, DType::kFp32, {E}, "router: bias_E");
  tensor::require(weights_TC, DType::kFp32, {T, options.top_k}, "router: weights_TC");
  tensor::require(experts_TC, DType::kInt32, {T, options.top_k}, "router: experts_TC");
  LOCKSTEP_CUDA_CALL(ctx, router, ctx, logits_TE, bias_E, options, weights_TC, experts_TC);
  const tensor::ArenaScope scope(*ctx.workspace);
  const cpu::RouterShape shape = shape_with_scratch(ctx, logits_TE, options);
  LOCKSTEP_CPU_CALL(ctx, router, shape, options, logits_TE.as<float>(),
                    bias_E ? bias_E.as<float>() : nullptr, weights_TC.as<float>(),
                    experts_TC.as<std::int32_t>());
}

void router_backward(const Context& ctx, const TensorView& logits_TE, const TensorView& experts_TC,
                     const TensorView& d_weights_TC, const TensorView& d_score_E,
                     const RouterOptions& options, const TensorView& d_logits_TE) {
  tensor::require(logits_TE, DType::kFp32, {-1, -1}, "router_backward: logits_TE");
  const std::int64_t T = logits_TE.dim(0), E = logits_TE.dim(1);
  check_options(ctx, options, E);
  tensor::require(experts_TC, DType::kInt32, {T, options.top_k}, "router_backward: experts_TC");
  tensor::require(d_weights_TC, DType::kFp32, {T, options.top_k}, "router_backward: d_weights_TC");
  if (d_score_E) tensor::require(d_score_E, DType::kFp32, {E}, "router_backward: d_score_E");
  tensor::require(d_logits_TE, DType::kFp32, {T, E}, "router_backward: d_logits_TE");
  LOCKSTEP_CUDA_CALL(ctx, router_backward, ctx, logits_TE, experts_TC, d_weights_TC, d_score_E,
                     options, d_logits_TE);
  const auto* experts = experts_TC.as<std::int32_t>();
  for (std::int64_t i = 0; i < experts_TC.count(); ++i)
    LOCKSTEP_CHECK(experts[i] >= 0 && experts[i] < E,
                   "router_backward: token {} slot {} names expert {} of {}", i / options.top_k,
                   i % options.top_k, experts[i], E);
  const tensor::ArenaScope scope(*ctx.workspace);
  const cpu::RouterShape shape = shape_with_scratch(ctx, logits_TE, options);
  LOCKSTEP_CPU_CALL(ctx, router_backward, shape, options, logits_TE.as<float>(), experts,
                    d_weights_TC.as<float>(), d_score_E ? d_score_E.as<float>() : nullptr,
                    d_logits_TE.as<float>());
}

void router_mean_scores(const Context& ctx, const TensorView& logits_TE,
                        const RouterOptions& options, const TensorView& sum_E) {
  tensor::require(logits_TE, DType::kFp32, {-1, -1}, "router_mean_scores: logits_TE");
  const std::int64_t T = logits_TE.dim(0), E = logits_TE.dim(1);
  check_options(ctx, options, E);
  tensor::require(sum_E, DType::kFp64, {E}, "router_mean_scores: sum_E");
  LOCKSTEP_CUDA_CALL(ctx, router_mean_scores, ctx, logits_TE, options, sum_E);
  const tensor::ArenaScope scope(*ctx.workspace);
  const cpu::RouterShape shape = shape_with_scratch(ctx, logits_TE, options);
  const std::int64_t blocks = (T + cpu::kRouterTokenBlock - 1) / cpu::kRouterTokenBlock;
  const TensorView block_sums = ctx.workspace->take(DType::kFp64, {blocks, E});
  LOCKSTEP_CPU_CALL(ctx, router_mean_scores, shape, options, logits_TE.as<float>(),
                    block_sums.as<double>(), sum_E.as<double>());
}

void balance_gradient(const Context& ctx, const TensorView& offsets_E1, const TensorView& sum_E,
                      const BalanceFactors& factors, const TensorView& d_score_E,
                      const TensorView& value) {
  tensor::require(sum_E, DType::kFp64, {-1}, "balance_gradient: sum_E");
  const std::int64_t E = sum_E.dim(0);
  LOCKSTEP_CHECK(ctx.device == tensor::Device::kCpu || E <= cuda::kMaxExperts,
                 "balance_gradient: {} experts, the GPU takes at most {}", E, cuda::kMaxExperts);
  tensor::require(offsets_E1, DType::kInt32, {E + 1}, "balance_gradient: offsets_E1");
  tensor::require(d_score_E, DType::kFp32, {E}, "balance_gradient: d_score_E");
  tensor::require(value, DType::kFp64, {1}, "balance_gradient: value");
  LOCKSTEP_CUDA_CALL(ctx, balance_gradient, ctx, offsets_E1, sum_E, factors, d_score_E, value);
  LOCKSTEP_CPU_CALL(ctx, balance_gradient, E, factors, offsets_E1.as<std::int32_t>(),
                    sum_E.as<double>(), d_score_E.as<float>(), value.as<double>());
}

}  // namespace lockstep::ops

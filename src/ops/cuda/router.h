#pragma once

#include "ops/router.h"

namespace lockstep::ops::cuda {

inline constexpr std::int64_t kMaxExperts = 1024;

void router(const Context& ctx, const TensorView& logits_TE, const TensorView& bias_E,
            const RouterOptions& options, const TensorView& weights_TC,
            const TensorView& experts_TC);
void router_backward(const Context& ctx, const TensorView& logits_TE, const TensorView& experts_TC,
                     const TensorView& d_weights_TC, const TensorView& d_score_E,
                     const RouterOptions& options, const TensorView& d_logits_TE);
void router_mean_scores(const Context& ctx, const TensorView& logits_TE,
                        const RouterOptions& options, const TensorView& sum_E);
void balance_gradient(const Context& ctx, const TensorView& offsets_E1, const TensorView& sum_E,
                      const BalanceFactors& factors, const TensorView& d_score_E,
                      const TensorView& value);

}  // namespace lockstep::ops::cuda

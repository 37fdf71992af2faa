// Expert selection (docs/numerics.md, section 9).
#pragma once

#include "ops/operand.h"

namespace lockstep::ops {

enum class RouterScore { kSoftmax, kSigmoid };

struct RouterOptions {
  RouterScore score = RouterScore::kSoftmax;
  int top_k = 1;
  int groups =
      1;  // group limit: only the best top_groups of `groups` equal slices of the experts take part
  int top_groups = 1;
  bool normalize = true;  // weights divided by their sum
  float scaling = 1.0f;   // then multiplied by this
};

// logits_TE FP32; bias_E FP32 or empty (added for the selection only). weights_TC FP32 and
// experts_TC int32, slots by descending selection value. A NaN logit never crashes: it sorts below
// every number.
void router(const Context& ctx, const TensorView& logits_TE, const TensorView& bias_E,
            const RouterOptions& options, const TensorView& weights_TC,
            const TensorView& experts_TC);

// d_logits_TE FP32 from d_weights_TC FP32; d_score_E FP32 or empty is added to every token's score
// gradient (the load-balancing loss). Scores are recomputed from the logits with the forward's
// bits.
void router_backward(const Context& ctx, const TensorView& logits_TE, const TensorView& experts_TC,
                     const TensorView& d_weights_TC, const TensorView& d_score_E,
                     const RouterOptions& options, const TensorView& d_logits_TE);

// Sums the scores (softmax, or sigmoid over their sum) of all tokens per expert, FP64 [E]; for the
// load-balancing loss.
void router_mean_scores(const Context& ctx, const TensorView& logits_TE,
                        const RouterOptions& options, const TensorView& sum_E);

}  // namespace lockstep::ops

// Expert selection (docs/numerics.md, sections 9 and 11).
#pragma once

#include "ops/operand.h"

namespace lockstep::ops {

enum class RouterScore { kSoftmax, kSigmoid };

struct RouterOptions {
  RouterScore score = RouterScore::kSoftmax;
  int top_k = 1;
  int groups = 1;  // group limit: only the best top_groups of `groups` equal slices of the experts
  int top_groups = 1;     // take part (1 of 1: all)
  bool normalize = true;  // weights divided by their sum
  float scaling = 1.0f;   // then multiplied by this
};

// logits_TE FP32; bias_E FP32 or empty (added for the selection only). weights_TC FP32 and
// experts_TC int32, slots by descending selection value, ties to the lower index; -0 equals +0. A
// NaN sorts below every number, so that C different experts are chosen even from a row of NaN.
// ContractError: groups do not divide E, top_groups outside [1, groups], top_k outside
// [1, E / groups * top_groups]; on the GPU, more than 1024 experts.
void router(const Context& ctx, const TensorView& logits_TE, const TensorView& bias_E,
            const RouterOptions& options, const TensorView& weights_TC,
            const TensorView& experts_TC);

// d_logits_TE FP32 from d_weights_TC FP32. The choice of experts is a constant. d_score_E FP32 or
// empty is d loss / d q_te, the same for every token t, where q are the scores that
// router_mean_scores sums (the load-balancing loss): softmax scores, or sigmoid scores over their
// sum. Scores are recomputed from the logits with the forward's bits. With s the scores of a token,
// c its slots, e_c their experts:
//   u_c = s[e_c], or with `normalize` s[e_c] / (sum + eps);  b_c = d_w_c * scaling;
//   with `normalize`: dot = fma over slots of b_c * u_c from 0;  b_c = (b_c - dot) / (sum + eps);
//   softmax: ds_e = d_score_e (0 where empty);  sigmoid: Q = strided_sum(s), q_e = s_e / Q,
//     ds_e = (d_score_e - strided_sum(d_score_e * q_e)) / Q (0 where empty);
//   ds[e_c] = ds[e_c] + b_c;
//   softmax: dz_e = s_e * (ds_e - strided_sum(ds_e * s_e));  sigmoid: dz_e = ds_e * (s_e *
//   (1-s_e)).
// The strided sums of products are in fma form. An expert outside [0, E) is a ContractError (on
// the GPU, where nobody can report it, the nearest one inside is taken).
void router_backward(const Context& ctx, const TensorView& logits_TE, const TensorView& experts_TC,
                     const TensorView& d_weights_TC, const TensorView& d_score_E,
                     const RouterOptions& options, const TensorView& d_logits_TE);

// sum_E (FP64) = the sum over all tokens of q (softmax scores, or sigmoid scores over their sum, in
// FP32): blocks of 128 tokens, each added in ascending order in double, blocks in ascending order.
void router_mean_scores(const Context& ctx, const TensorView& logits_TE,
                        const RouterOptions& options, const TensorView& sum_E);

// What the load-balancing loss of a layer is scaled by: its coefficient, the micro-batch's weight
// in the step, and the tokens and slots that the counts and sums are over.
struct BalanceFactors {
  double coefficient = 0, weight = 1;
  std::int64_t tokens = 0, top_k = 1;
};

// The loss is the sum over e of slope_e * sum_E[e], where sum_E (FP64) is what router_mean_scores
// wrote, the number of e's rows is offsets_E1[e + 1] - offsets_E1[e] (int32), and in double, left
// to right, slope_e = coefficient * weight * E * rows_e / (top_k * tokens * tokens). d_score_E
// (FP32) = the slopes; value [1] (FP64) is added to, one product after the other in ascending e.
void balance_gradient(const Context& ctx, const TensorView& offsets_E1, const TensorView& sum_E,
                      const BalanceFactors& factors, const TensorView& d_score_E,
                      const TensorView& value);

}  // namespace lockstep::ops

// The backward pass: forward_layer's list of ops, mirrored (docs/numerics.md, sections 11 and 12).
#pragma once

#include "model/forward.h"
#include "policy/gradients.h"

namespace lockstep::policy {

// Load-balancing loss of the routers (Switch Transformer, arXiv 2101.03961, with Megatron's
// normalisation): per layer coefficient * E / (C * T) * sum_e count_e * mean_t score_e(t), so a
// balanced router gives `coefficient`.
struct BalanceLoss {
  double coefficient = 0;
  double weight = 1;  // the micro-batch's share of the step
  double value = 0;   // out: the sum over layers, weighted
};

// Every weight's gradient but the head's goes to `grads`, for d_hidden_TD = d loss / d hidden
// (BF16); a tied embedding's is added to what head_backward left there. `sink` is what forward()
// left for this batch. With sink.recompute each layer's forward runs again first; the bits are the
// same.
void backward(const tensor::Context& ctx, const model::ModelView& model,
              const model::ForwardBatch& batch, const model::ForwardSink& sink,
              const tensor::TensorView& d_hidden_TD, BalanceLoss* balance, const Gradients& grads,
              model::ForwardStats* gradient_stats);

}  // namespace lockstep::policy

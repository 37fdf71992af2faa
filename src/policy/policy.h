// The policy: weights with their optimizer, trained a step at a time. The loss comes from outside
// as a function of the log-probabilities, so this room knows nothing of reinforcement learning.
//
//   begin_step(policy);
//   for each micro-batch: accumulate(policy, sequences, share, loss);
//   StepResult r = finish_step(policy, learning_rate);
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "data/trajectory.h"
#include "model/forward.h"
#include "ops/optimizer.h"
#include "ops/vocab.h"

namespace lockstep::policy {

// What happens when the loss or the gradient of a step is not finite.
struct Guard {
  bool abort = false;  // else: skip the optimizer step
  std::int64_t max_consecutive = 3, max_total = 20;
};

struct PolicyOptions {
  model::Precision precision;
  ops::AdamwOptions adamw;  // lr, step and clip are set by finish_step
  bool bf16_moments = false;
  double max_grad_norm = 1.0;
  bool activation_checkpointing = false;
  double aux_loss_coeff = 0;  // load-balancing loss, policy/backward.h
  double bias_update_rate =
      0;  // balancing by selection bias: bias_e += rate * sign(mean load - load_e) a step
  Guard guard;
};

// Log-probability of every trained token of a micro-batch, [sequence][position], 0 where loss_mask
// is 0.
using Logprobs = std::vector<std::vector<float>>;

// Returns the micro-batch's contribution to the loss and writes d loss / d logprob (same shape).
using LossFunction = std::function<double(const Logprobs& logprobs, Logprobs& d_logprobs)>;

struct StepResult {
  double loss = 0, grad_norm = 0, lr = 0, aux_loss = 0;
  bool skipped = false;
  std::string skip_reason;
  std::map<std::string, double> metrics;  // moe/*, fp8/*
};

struct Policy {
  PolicyOptions options;
  tensor::Context ctx;
  std::shared_ptr<model::Weights> weights;
  std::shared_ptr<model::QuantizedWeights> quantized;
  model::RopeTables rope;
  tensor::Tensor master, m, v, grads;  // slabs in the table's layout
  // Whether `grads` has gradients of this step. Until then it holds anything.
  bool accumulated = false;
  std::int64_t optimizer_step = 0;  // steps taken, AdamW's t
  std::int64_t skipped_consecutive = 0, skipped_total = 0;

  tensor::Arena saved;  // activations of one micro-batch
  double loss = 0, aux_loss = 0;
  std::int64_t tokens = 0;
  model::ForwardStats forward_stats, gradient_stats;

  model::ModelView view() const;
};

// Masters start from the BF16 weights.
Policy make_policy(const tensor::Context& ctx, std::shared_ptr<model::Weights> weights,
                   const PolicyOptions& options);

// Forward only. `sampling` gives temperature and filters. Entropies (same shape) may be null.
Logprobs score(const tensor::Context& ctx, const model::ModelView& model,
               std::span<const data::TrainSequence> sequences, const ops::RowSampling& sampling,
               Logprobs* entropies = nullptr);

void begin_step(Policy& policy);

// One micro-batch: forward, loss, backward. `share` is its part of the step (for the load-balancing
// loss). Returns the log-probabilities.
Logprobs accumulate(Policy& policy, std::span<const data::TrainSequence> sequences, double share,
                    const ops::RowSampling& sampling, const LossFunction& loss);

// Finite checks, clipping, AdamW, and the FP8 weights again. A skipped step changes no weight;
// beyond the guard's budget (or with guard.abort) a SystemError says what was not finite, and the
// weights are still those of the last good step.
StepResult finish_step(Policy& policy, double learning_rate);

// Refreshes BF16 weights and FP8 codes from the masters (after loading a checkpoint).
void publish(Policy& policy);

}  // namespace lockstep::policy

// The parts of one RL step, as functions on what the run holds.
#pragma once

#include "loop/evaluate.h"
#include "loop/metrics.h"
#include "loop/setup.h"
#include "rl/mismatch.h"
#include "rl/train_batch.h"
#include "tensor/op_profile.h"

namespace lockstep::loop {

// Everything that a run holds between steps.
struct RlRun {
  RunConfig config;
  tensor::Arena workspace;
  std::unique_ptr<tensor::OpProfile> profile;  // with logger.profile_ops on a GPU
  model::Tokenizer tokenizer;
  std::shared_ptr<model::Weights> weights;
  policy::Policy policy;
  std::shared_ptr<model::QuantizedWeights>
      rollout_weights;  // the policy's own where the precision is one
  std::shared_ptr<model::Weights>
      reference;  // with a KL penalty: the weights that the run started from
  std::shared_ptr<model::QuantizedWeights> reference_quantized;
  std::string reference_checksum;
  std::unique_ptr<rollout::Engine> engine;
  std::unique_ptr<PromptSource> train, validation;
  rl::Preset preset;
  rl::RewardConfig reward;
  data::SamplingParams sampling;
  policy::Schedule schedule;
  bool one_precision = true;
  std::int64_t next_prompt = 0;
  std::int64_t total_valid_tokens = 0;

  model::ModelView rollout_view() const;
};

// Loads the model and sets everything up for step 1. Nothing is written.
std::unique_ptr<RlRun> make_rl_run(const RunConfig& config);

// What one step sampled: whole groups of num_generations_per_prompt.
struct Experience {
  std::vector<data::Prompt> prompts;
  std::vector<data::Trajectory> trajectories;
  rl::Advantages advantages;
  std::int64_t generation_batches = 1;  // more than 1 with dynamic sampling
  std::int64_t groups_dropped = 0;      // by dynamic sampling, of all batches
  double generation_seconds = 0, reward_seconds = 0;
};

Experience gather(RlRun& run);

// Sequences whose log-probabilities a step may ask for at once, apart from the update; 0: none.
std::int64_t scored_at_once(const RlRun& run);

// Trains on it: one or more optimizer steps. Fills train/*, fp8/*, moe/* and
// timing/train/policy_training. Throws SystemError when policy and rollout share a precision and a
// compared log-probability differs in a bit: then no weight has changed.
void train(RlRun& run, std::int64_t step, const Experience& experience, Metrics& metrics);

}  // namespace lockstep::loop

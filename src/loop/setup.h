// From the run configuration to what each room takes. Nothing else reads RunConfig's strings.
#pragma once

#include "data/trajectory.h"
#include "loop/config.h"
#include "model/precision.h"
#include "model/tokenizer.h"
#include "ops/vocab.h"
#include "policy/policy.h"
#include "policy/schedule.h"
#include "rl/presets.h"
#include "rl/rewards.h"
#include "rl/tasks.h"
#include "rollout/engine.h"

namespace lockstep::loop {

// `device`: auto takes a GPU where there is one that the build can use; cuda without one is an
// InputError that says why. The workspace becomes an arena of that device.
tensor::Context make_context(const RunConfig& config, tensor::Arena& workspace);

model::Precision policy_precision(const RunConfig& config);
model::Precision rollout_precision(const RunConfig& config);
policy::PolicyOptions policy_options(const RunConfig& config);
policy::Schedule schedule(const RunConfig& config, std::int64_t total_steps);

// Estimator preset with the keys that the config sets on top.
rl::Preset estimator(const RunConfig& config);

// The rollout's sampling for training; stop tokens are those of the config, or the model's.
data::SamplingParams sampling_params(const RunConfig& config, const model::ModelConfig& model);
// The distribution the policy must compute to match it.
ops::RowSampling row_sampling(const data::SamplingParams& params);

rollout::Options engine_options(const RunConfig& config);
rl::RewardConfig reward_config(const RunConfig& config);
rl::TaskConfig task_config(const RunConfig& config, const DataSourceConfig& source);

// Sets the prompt's text and tokens. A conversation goes through the chat template of a model that
// has one (the system prompt is then a turn of its own, unless the conversation starts with one);
// else the tokens are those of system prompt and text, in which no special token is recognised.
void encode_prompt(const model::Tokenizer& tokenizer, const std::string& system_prompt,
                   data::Prompt& prompt);

// Prompts by index: a built-in task, or a JSONL file in the order of its epochs.
class PromptSource {
 public:
  PromptSource(const RunConfig& config, const DataSourceConfig& source, rl::Split split,
               const model::Tokenizer& tokenizer);
  // InputError when the prompt leaves no room for a response.
  data::Prompt prompt(std::int64_t index) const;
  std::int64_t size() const;  // of a file, or of a validation set; unbounded sources give max int64

 private:
  // The tokens of system prompt and prompt, within the room that there is.
  void encode(data::Prompt& prompt, const std::string& where) const;

  std::string system_prompt_;
  std::int64_t max_length_ = 0;  // policy.max_total_sequence_length
  std::int64_t num_samples_ = 0;
  rl::Split split_;
  bool shuffle_ = true;
  std::uint64_t seed_ = 0;
  const model::Tokenizer& tokenizer_;
  rl::TaskConfig task_;
  std::vector<data::Prompt> file_;
  mutable std::vector<std::int64_t> order_;  // of the epoch asked for last
  mutable std::int64_t order_epoch_ = -1;
};

}  // namespace lockstep::loop

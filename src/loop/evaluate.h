// Held-out accuracy: answers to validation prompts, scored by the run's reward.
#pragma once

#include "loop/setup.h"

namespace lockstep::loop {

struct EvalSample {
  std::string prompt, response, label;
  double reward = 0;
};

struct EvalResult {
  double accuracy = 0;  // mean reward
  std::int64_t samples = 0;
  double mean_tokens = 0;
  std::vector<EvalSample> examples;  // the first few
};

// One answer to each of the first `count` validation prompts with the run's own sampling, from
// random streams that no training sample uses. The same prompts and streams at every call.
EvalResult evaluate(rollout::Engine& engine, const PromptSource& source, std::int64_t count,
                    const data::SamplingParams& sampling, const rl::RewardConfig& reward,
                    std::uint64_t seed, std::int64_t examples);

}  // namespace lockstep::loop

// Reinforcement learning: prompts -> rollout -> rewards -> advantages -> policy update -> refit,
// one step after the other.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "loop/session.h"

namespace lockstep::loop {

struct RlSummary {
  std::int64_t steps = 0;  // done in all, also before a resume
  // By SIGINT or SIGTERM, before the last step. The steps done are saved unless
  // checkpointing.enabled is false.
  bool interrupted = false;
  std::optional<double> first_accuracy, last_accuracy;
  std::int64_t logprobs_compared = 0, logprobs_different = 0;  // of all steps
  double seconds = 0;
  std::string memory;  // on a GPU: the peak of what was planned
  std::filesystem::path folder, report;
};

// Runs to grpo.max_num_steps or the end of grpo.max_num_epochs. Errors are thrown; what was saved
// before stays resumable.
RlSummary run_rl(const RunConfig& config, const Resume& resume);

}  // namespace lockstep::loop

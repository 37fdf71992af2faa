// Reinforcement learning: prompts -> rollout -> rewards -> advantages -> policy update -> refit,
// one step after the other.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "loop/session.h"

namespace lockstep::loop {

struct RlSummary {
  std::int64_t steps = 0;    // done in all, also before a resume
  bool interrupted = false;  // by SIGINT or SIGTERM; a checkpoint was written
  std::optional<double> first_accuracy, last_accuracy;
  std::int64_t logprobs_compared = 0, logprobs_different = 0;  // of this process
  double seconds = 0;
  std::filesystem::path folder, report;
};

// Runs to grpo.max_num_steps. Errors are thrown; what was saved before stays resumable.
RlSummary run_rl(const RunConfig& config, const Resume& resume);

}  // namespace lockstep::loop

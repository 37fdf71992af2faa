// Next-token training from random weights or a checkpoint: plain text in windows of sequence_length
// bytes, JSONL demonstrations, or built-in demonstrations (loss on the answer). Same policy, same
// precision options as `rl`.
#pragma once

#include "loop/session.h"

namespace lockstep::loop {

struct PretrainSummary {
  std::int64_t steps = 0;
  bool interrupted = false;
  double first_loss = 0, last_loss = 0;   // of training steps of this process
  std::optional<double> validation_loss;  // the last one
  double seconds = 0;
  std::string memory;  // on a GPU: the peak of what was planned
  std::filesystem::path folder, report;
  std::filesystem::path output;  // the Hugging Face folder; empty when interrupted
};

// Starts from policy.model_name when it is set, else from random weights of the shape
// pretrain.model.
PretrainSummary run_pretrain(const RunConfig& config, const Resume& resume);

}  // namespace lockstep::loop

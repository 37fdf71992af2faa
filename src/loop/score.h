// Log-probabilities of given texts, with the forward pass that training and rollout share.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "loop/loaded_model.h"

namespace lockstep::loop {

struct Scored {
  std::vector<float> logprobs;  // of token t at t; the first has none (NaN)
  double sum = 0;               // of all but the first, in order, in double
};

// Receives FP32 logits of consecutive positions of one sequence, [count, vocabulary] in host
// memory.
using LogitsSink = std::function<void(std::size_t sequence, std::int64_t position,
                                      std::int64_t count, std::span<const float> logits)>;

// The natural log-probability of every token given those before it, temperature 1. Each sequence
// has at least one token; one longer than the model's positions or with a token outside the
// vocabulary is an InputError that names its index. `sink` may be null.
std::vector<Scored> score(LoadedModel& model,
                          const std::vector<std::vector<std::int32_t>>& sequences,
                          const LogitsSink& sink = nullptr);

}  // namespace lockstep::loop

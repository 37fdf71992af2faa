// When a response is over.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "rollout/sequence.h"

namespace lockstep::rollout {

using Detokenize = std::function<std::string(const std::vector<std::int32_t>&)>;

struct Ending {
  data::FinishReason reason;
  std::string text;
};

// After a token was appended. In this order: a stop token (the text is without it), a stop string
// anywhere in the detokenised response, so that it may span tokens (the text ends before the first
// one), the greatest length. A request with stop strings is detokenised whole at every token.
std::optional<Ending> ending(const Sequence& sequence, const Detokenize& detokenize);

std::vector<std::int32_t> response(const Sequence& sequence);

}  // namespace lockstep::rollout

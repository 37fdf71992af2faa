#include "rollout/ending.h"

#include <algorithm>

namespace lockstep::rollout {

using data::FinishReason;

std::vector<std::int32_t> response(const Sequence& sequence) {
  return {sequence.tokens.begin() + sequence.prompt_length, sequence.tokens.end()};
}

std::optional<Ending> ending(const Sequence& sequence, const Detokenize& detokenize) {
  const data::SamplingParams& s = sequence.request.sampling;
  if (std::find(s.stop_token_ids.begin(), s.stop_token_ids.end(), sequence.tokens.back()) !=
      s.stop_token_ids.end()) {
    std::vector<std::int32_t> tokens = response(sequence);
    tokens.pop_back();
    return Ending{FinishReason::kStop, detokenize(tokens)};
  }
  const bool full = sequence.length() >= sequence.max_length;
  if (s.stop_strings.empty() && !full) return std::nullopt;
  std::string text = detokenize(response(sequence));
  std::size_t cut = std::string::npos;
  for (const std::string& stop : s.stop_strings) cut = std::min(cut, text.find(stop));
  if (cut != std::string::npos) return Ending{FinishReason::kStop, text.substr(0, cut)};
  if (full) return Ending{FinishReason::kLength, std::move(text)};
  return std::nullopt;
}

}  // namespace lockstep::rollout

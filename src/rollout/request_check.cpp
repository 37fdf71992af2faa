#include "rollout/request_check.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace lockstep::rollout {

using base::fail;
using base::InputError;

namespace {

void check_sampling(const Request& request) {
  const data::SamplingParams& s = request.sampling;
  const auto id = request.prompt_id;
  if (s.max_new_tokens < 0)
    fail<InputError>("prompt {}: max_new_tokens is {}; it must be 0 or more", id, s.max_new_tokens);
  if (!(s.temperature >= 0) || !std::isfinite(s.temperature) ||
      (s.temperature > 0 && !std::isfinite(1.0f / s.temperature)))
    fail<InputError>("prompt {}: temperature is {}; it must be 0 (greedy) or a positive number", id,
                     s.temperature);
  if (!(s.top_p > 0))
    fail<InputError>("prompt {}: top_p is {}; it must be above 0 (1 switches it off)", id, s.top_p);
  if (!(s.min_p <= 1))
    fail<InputError>("prompt {}: min_p is {}; it must be at most 1 (0 switches it off)", id,
                     s.min_p);
  for (const std::string& stop : s.stop_strings)
    if (stop.empty()) fail<InputError>("prompt {}: an empty stop string; remove it", id);
}

}  // namespace

std::int64_t max_length(const Request& request, const RequestLimits& limits) {
  const auto prompt = static_cast<std::int64_t>(request.prompt.size());
  return std::min(prompt + request.sampling.max_new_tokens, limits.max_model_len);
}

void check_request(const Request& request, const RequestLimits& limits) {
  const auto id = request.prompt_id;
  const auto prompt = static_cast<std::int64_t>(request.prompt.size());
  if (prompt == 0) fail<InputError>("prompt {}: it is empty; give it at least one token", id);
  if (prompt > limits.max_model_len)
    fail<InputError>(
        "prompt {}: {} tokens, but max_model_len is {}; shorten the prompt or raise max_model_len",
        id, prompt, limits.max_model_len);
  for (std::int64_t i = 0; i < prompt; ++i)
    if (request.prompt[i] < 0 || request.prompt[i] >= limits.vocab_size)
      fail<InputError>("prompt {}: token {} at position {} is outside the vocabulary of {}", id,
                       request.prompt[i], i, limits.vocab_size);
  check_sampling(request);
  const std::int64_t length = max_length(request, limits);
  const std::int64_t pages = (length - 1 + limits.block_size - 1) / limits.block_size;
  if (length > prompt && pages > limits.num_blocks)
    fail<InputError>(
        "prompt {}: {} prompt tokens and up to {} new ones need {} pages of {} tokens, but "
        "num_blocks is {}; raise num_blocks or lower max_new_tokens",
        id, prompt, length - prompt, pages, limits.block_size, limits.num_blocks);
}

}  // namespace lockstep::rollout

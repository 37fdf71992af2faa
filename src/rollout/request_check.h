// What a request must look like.
#pragma once

#include "rollout/sequence.h"

namespace lockstep::rollout {

struct RequestLimits {
  std::int64_t vocab_size = 0;
  std::int64_t max_model_len = 0;
  std::int64_t num_blocks = 0;
  int block_size = 1;
};

// Longest that the request may become, prompt and response: it ends with kLength there.
std::int64_t max_length(const Request& request, const RequestLimits& limits);

// Throws InputError that names the prompt, the value and the limit: an empty prompt, a prompt
// longer than max_model_len, tokens outside the vocabulary, more pages than there are, sampling
// parameters without a meaning.
void check_request(const Request& request, const RequestLimits& limits);

}  // namespace lockstep::rollout

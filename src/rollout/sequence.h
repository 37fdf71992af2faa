// A request, and what becomes of it while it runs.
#pragma once

#include <cstdint>
#include <vector>

#include "data/trajectory.h"

namespace lockstep::rollout {

// One sample to draw. Its tokens are a function of the weights, `prompt`, `sampling`, `seed` and
// `stream` alone: submitting a request twice gives the same answer twice.
struct Request {
  std::uint64_t seed = 0;    // Philox key
  std::uint64_t stream = 0;  // Philox counter, high half: tells the requests of one seed apart
  std::int64_t prompt_id = 0;
  int sample = 0;
  std::vector<std::int32_t> prompt;
  data::SamplingParams sampling;
};

// The stream of sample `sample` of prompt `prompt_id`: 2^24 samples a prompt, 2^40 prompts.
inline std::uint64_t request_stream(std::int64_t prompt_id, int sample) {
  return (static_cast<std::uint64_t>(prompt_id) << 24) | static_cast<std::uint32_t>(sample);
}

enum class Status { kWaiting, kRunning, kFinished };

struct Sequence;

// Live sequences with equal prompts. The leader is the running member that computes the prompt; the
// others wait for it and then share its pages.
struct PromptGroup {
  std::vector<Sequence*> members;
  Sequence* leader = nullptr;
};

struct Sequence {
  Request request;
  std::int64_t id = 0;  // order of arrival
  std::int64_t prompt_length = 0;
  std::int64_t max_length = 0;       // prompt and response
  std::vector<std::int32_t> tokens;  // prompt, then what was sampled
  std::vector<float> logprobs;       // of the sampled tokens

  Status status = Status::kWaiting;
  std::int64_t computed = 0;        // tokens whose keys and values lie in the pages
  std::vector<std::int32_t> pages;  // token i lies in pages[i / block_size]
  PromptGroup* group = nullptr;     // null without prefix sharing

  std::int64_t length() const { return static_cast<std::int64_t>(tokens.size()); }
  std::int64_t response_length() const { return length() - prompt_length; }
};

// Row of the cache that holds token `position`.
inline std::int32_t cache_row(const Sequence& sequence, std::int64_t position, int block_size) {
  return static_cast<std::int32_t>(
      sequence.pages[position / block_size] * std::int64_t{block_size} + position % block_size);
}

}  // namespace lockstep::rollout

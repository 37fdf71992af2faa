// Nouns that cross rooms: what a prompt is, what the rollout returns, what the policy trains on.
// Host memory only.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lockstep::data {

struct Message {
  std::string role;
  std::string content;
};

// One problem to solve. `label` is what the reward compares with; `task` names the generator or
// file it came from. `messages` is set where the source has a conversation: a chat template may
// render it in place of `text`.
struct Prompt {
  std::int64_t id = 0;  // position in the data order, also the random stream of its samples
  std::string text;
  std::string label;
  std::string task;
  std::vector<std::int32_t> tokens;
  std::vector<Message> messages;
};

enum class FinishReason { kStop, kLength, kAbort };

// How tokens are drawn. temperature 0 is greedy (log-probabilities are then those of temperature
// 1). top_k <= 0, top_p >= 1 and min_p <= 0 switch the filter off.
struct SamplingParams {
  float temperature = 1.0f;
  int top_k = -1;
  float top_p = 1.0f;
  float min_p = 0.0f;
  int max_new_tokens = 16;
  std::vector<std::int32_t> stop_token_ids;
  std::vector<std::string> stop_strings;
};

// One sampled answer. logprobs[i] is the natural log-probability of response[i] under the
// distribution that it was sampled from, with the weights of version weight_version.
struct Trajectory {
  std::int64_t prompt_id = 0;
  int sample = 0;  // 0 .. num_generations_per_prompt-1
  std::vector<std::int32_t> prompt;
  std::vector<std::int32_t> response;  // includes the stop token, if one ended it
  std::vector<float> logprobs;
  FinishReason finish = FinishReason::kLength;
  std::uint64_t weight_version = 0;
  std::string text;  // the response, detokenised, without the stop token
  double reward = 0;
};

// One training sequence: prompt and response together. Per-token arrays have the length of
// `tokens`; entry t speaks of the prediction of tokens[t] from tokens[0..t) (entry 0 is unused).
// loss_mask[t] = 1 where tokens[t] is trained on.
struct TrainSequence {
  std::vector<std::int32_t> tokens;
  std::vector<float> loss_mask;
  std::vector<float> generation_logprobs;  // from the rollout
  std::vector<float> prev_logprobs;        // from the policy before this RL step's first update
  std::vector<float> reference_logprobs;   // from the reference policy; empty without a KL penalty
  std::vector<float> advantages;
  float sample_mask = 1;   // 0 drops the whole sequence from the loss
  std::int64_t group = 0;  // sequences of one prompt share it
};

struct TrainBatch {
  std::vector<TrainSequence> sequences;
};

}  // namespace lockstep::data

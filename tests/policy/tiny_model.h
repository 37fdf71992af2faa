// A small random Qwen3-MoE and training sequences, for tests of the policy and of everything above
// it.
#pragma once

#include "base/philox.h"
#include "model/families.h"
#include "policy/policy.h"

namespace lockstep::policy::test {

inline model::ModelConfig tiny_config() {
  model::ModelConfig c;
  c.vocab_size = 96;
  c.hidden_size = 64;
  c.num_layers = 2;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.head_dim = 16;
  c.max_positions = 256;
  c.qk_norm = true;
  c.num_experts = 4;
  c.moe_intermediate_size = 48;  // not a multiple of 128: the slabs are padded
  c.router.top_k = 2;
  c.initializer_range = 0.1;
  return c;
}

inline std::shared_ptr<model::Weights> tiny_weights(
    std::uint64_t seed = 1, const model::ModelConfig& config = tiny_config()) {
  auto w = std::make_shared<model::Weights>(model::make_weights(config));
  model::initialize(*w, seed);
  model::randomize_biases(*w);
  return w;
}

inline std::vector<data::TrainSequence> random_sequences(int count, int longest,
                                                         std::uint64_t seed = 7) {
  std::vector<data::TrainSequence> out;
  for (int s = 0; s < count; ++s) {
    data::TrainSequence sequence;
    const auto length =
        2 + base::philox4x32(seed, 99, s).word[0] % static_cast<unsigned>(longest - 1);
    for (unsigned t = 0; t < length; ++t)
      sequence.tokens.push_back(
          static_cast<std::int32_t>(base::philox4x32(seed, s, t).word[0] % 96));
    sequence.loss_mask.assign(length, 1.0f);
    sequence.loss_mask[0] = 0;
    out.push_back(sequence);
  }
  return out;
}

// Mean negative log-probability over `total` tokens.
inline LossFunction mean_loss(std::span<const data::TrainSequence> sequences, double total) {
  return [sequences, total](const Logprobs& logprobs, Logprobs& d) {
    double loss = 0;
    for (std::size_t s = 0; s < logprobs.size(); ++s)
      for (std::size_t t = 0; t < logprobs[s].size(); ++t)
        if (sequences[s].loss_mask[t] > 0)
          loss -= logprobs[s][t] / total, d[s][t] = static_cast<float>(-1 / total);
    return loss;
  };
}

inline double count_tokens(std::span<const data::TrainSequence> sequences) {
  double n = 0;
  for (const auto& s : sequences)
    for (const float m : s.loss_mask) n += m;
  return n;
}

}  // namespace lockstep::policy::test

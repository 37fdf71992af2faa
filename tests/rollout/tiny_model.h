// A small random model, requests of many kinds, and the policy's view of an answer, for tests of
// the engine.
#pragma once

#include <cstring>
#include <memory>

#include "base/philox.h"
#include "model/families.h"
#include "rollout/engine.h"

namespace lockstep::rollout::test {

inline model::ModelConfig tiny_config(std::int64_t max_positions) {
  model::ModelConfig c;
  c.vocab_size = 67;
  c.hidden_size = 64;
  c.num_layers = 2;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.head_dim = 16;
  c.max_positions = max_positions;
  c.qk_norm = true;
  c.num_experts = 4;
  c.moe_intermediate_size = 48;
  c.router.top_k = 2;
  c.initializer_range = 0.2;
  return c;
}

struct TinyModel {
  explicit TinyModel(const model::Precision& precision, std::uint64_t seed = 1,
                     std::int64_t max_positions = 128)
      : TinyModel(precision, seed, tiny_config(max_positions)) {}
  TinyModel(const model::Precision& precision, std::uint64_t seed, const model::ModelConfig& config)
      : ctx(tensor::cpu_context(arena, 1)), weights(model::make_weights(config)) {
    model::initialize(weights, seed);
    model::randomize_biases(weights);
    quantized = model::quantized_for(ctx, weights, precision);
    rope = model::make_rope_tables(ctx, weights.config);
  }
  model::ModelView view() const { return {&weights, quantized.get(), rope.cos_PK, rope.sin_PK}; }

  tensor::Arena arena;
  tensor::Context ctx;
  model::Weights weights;
  std::shared_ptr<model::QuantizedWeights> quantized;
  model::RopeTables rope;
};

// Token i is the letter 'a' + i % 26, so that stop strings are easy to write.
inline std::string letters(const std::vector<std::int32_t>& tokens) {
  std::string text;
  for (const std::int32_t token : tokens) text += static_cast<char>('a' + token % 26);
  return text;
}

inline Request request(std::vector<std::int32_t> prompt, int max_new_tokens,
                       std::uint64_t stream = 0) {
  Request r;
  r.seed = 42;
  r.stream = stream;
  r.prompt_id = static_cast<std::int64_t>(stream);
  r.prompt = std::move(prompt);
  r.sampling.max_new_tokens = max_new_tokens;
  return r;
}

inline std::vector<std::int32_t> random_tokens(std::int64_t count, std::uint64_t seed) {
  std::vector<std::int32_t> out;
  for (std::int64_t i = 0; i < count; ++i)
    out.push_back(static_cast<std::int32_t>(base::philox4x32(9, seed, i).word[0] % 67));
  return out;
}

// `count` requests, samples of one prompt in fours; prompts of 1 to 21 tokens, 1 to 12 new ones,
// every kind of sampling and of ending.
inline std::vector<Request> mixed_requests(int count) {
  std::vector<Request> out;
  for (int i = 0; i < count; ++i) {
    const int prompt = i / 4;
    Request r = request(random_tokens(1 + prompt * 7 % 21, prompt), 1 + i * 5 % 12);
    r.stream = request_stream(prompt, i % 4);
    r.prompt_id = prompt;
    r.sample = i % 4;
    data::SamplingParams& s = r.sampling;
    if (i % 7 == 1) s.temperature = 0;
    if (i % 7 == 2) s.temperature = 0.7f, s.top_k = 5;
    if (i % 7 == 3) s.top_p = 0.8f;
    if (i % 7 == 4) s.min_p = 0.05f, s.temperature = 1.3f;
    if (i % 7 == 5) s.top_k = 20, s.top_p = 0.9f, s.min_p = 0.01f;
    if (i % 3 == 0) s.stop_token_ids = {5, 11, 17, 23, 29, 31, 44, 60};
    if (i % 5 == 0) s.stop_strings = {"bc", "q", "e", "h"};
    out.push_back(r);
  }
  return out;
}

// What the policy sees: one forward over prompt and response without a cache, then the stats of
// every response token. `drawn` receives the tokens that sampling from the same rows gives.
inline std::vector<ops::RowStats> policy_view(const TinyModel& m, const Request& r,
                                              const std::vector<std::int32_t>& response,
                                              std::vector<std::int32_t>* drawn) {
  using tensor::DType;
  tensor::ArenaScope scratch(*m.ctx.workspace);
  tensor::Arena& arena = *m.ctx.workspace;
  std::vector<std::int32_t> tokens = r.prompt;
  tokens.insert(tokens.end(), response.begin(), response.end());
  const auto T = static_cast<std::int64_t>(tokens.size());
  const auto R = static_cast<std::int64_t>(response.size());
  model::ForwardBatch batch;
  batch.tokens_T = arena.take(DType::kInt32, {T});
  batch.positions_T = arena.take(DType::kInt32, {T});
  batch.attention.q_offsets_S1 = arena.take(DType::kInt32, {2});
  batch.attention.kv_lengths_S = arena.take(DType::kInt32, {1});
  std::memcpy(batch.tokens_T.data, tokens.data(), batch.tokens_T.bytes());
  for (std::int64_t t = 0; t < T; ++t)
    batch.positions_T.as<std::int32_t>()[t] = static_cast<std::int32_t>(t);
  batch.attention.q_offsets_S1.as<std::int32_t>()[0] = 0;
  batch.attention.q_offsets_S1.as<std::int32_t>()[1] = static_cast<std::int32_t>(T);
  batch.attention.kv_lengths_S.as<std::int32_t>()[0] = static_cast<std::int32_t>(T);
  const auto hidden_TD = arena.take(DType::kBf16, {T, m.weights.config.hidden_size});
  model::forward(m.ctx, m.view(), batch, nullptr, nullptr, hidden_TD);
  const auto logits_RV = arena.take(DType::kFp32, {R, m.weights.config.vocab_size});
  model::head_logits(m.ctx, m.view(),
                     hidden_TD.rows(static_cast<std::int64_t>(r.prompt.size()) - 1, R), logits_RV);
  const auto targets_R = arena.take(DType::kInt32, {R});
  std::memcpy(targets_R.data, response.data(), targets_R.bytes());
  std::vector<ops::RowSampling> sampling(R);
  for (std::int64_t i = 0; i < R; ++i)
    sampling[i] = {r.sampling.temperature,
                   r.sampling.top_k,
                   r.sampling.top_p,
                   r.sampling.min_p,
                   r.seed,
                   r.stream,
                   static_cast<std::uint32_t>(i)};
  std::vector<ops::RowStats> stats(R), ignored(R);
  ops::vocab_logprobs(m.ctx, logits_RV, targets_R, sampling.data(), stats.data());
  ops::vocab_sample(m.ctx, logits_RV, sampling.data(), targets_R, ignored.data());
  drawn->assign(targets_R.as<std::int32_t>(), targets_R.as<std::int32_t>() + R);
  return stats;
}

}  // namespace lockstep::rollout::test

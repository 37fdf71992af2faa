// Reads tests/data/rl/golden.json (written by tools/golden/rl.py).
#pragma once

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "rl/loss.h"

namespace lockstep::rl {

inline nlohmann::json golden() {
  std::ifstream file(LOCKSTEP_TEST_DATA "/rl/golden.json");
  return nlohmann::json::parse(file);
}

inline std::vector<data::TrainSequence> golden_sequences(const nlohmann::json& file) {
  std::vector<data::TrainSequence> out;
  for (const auto& row : file["sequences"]) {
    data::TrainSequence s;
    s.loss_mask = row["loss_mask"].get<std::vector<float>>();
    s.tokens.assign(s.loss_mask.size(), 7);
    s.generation_logprobs = row["generation_logprobs"].get<std::vector<float>>();
    s.prev_logprobs = row["prev_logprobs"].get<std::vector<float>>();
    s.reference_logprobs = row["reference_logprobs"].get<std::vector<float>>();
    s.advantages = row["advantages"].get<std::vector<float>>();
    s.sample_mask = row["sample_mask"].get<float>();
    out.push_back(s);
  }
  return out;
}

inline std::vector<std::vector<float>> golden_logprobs(const nlohmann::json& file) {
  std::vector<std::vector<float>> out;
  for (const auto& row : file["sequences"])
    out.push_back(row["curr_logprobs"].get<std::vector<float>>());
  return out;
}

inline LossConfig loss_config(const nlohmann::json& c) {
  LossConfig config;
  config.ratio_clip_min = c.value("ratio_clip_min", config.ratio_clip_min);
  config.ratio_clip_max = c.value("ratio_clip_max", config.ratio_clip_max);
  config.ratio_clip_c = c.value("ratio_clip_c", config.ratio_clip_c);
  config.disable_ppo_ratio = c.value("disable_ppo_ratio", false);
  config.force_on_policy_ratio = c.value("force_on_policy_ratio", false);
  config.sequence_level_importance_ratios = c.value("sequence_level_importance_ratios", false);
  config.use_cispo = c.value("use_cispo", false);
  config.loss_agg = loss_aggregation_from(c.value("loss_agg", "token-mean"));
  config.loss_agg_length = c.value("loss_agg_length", 0.0);
  config.reference_policy_kl_penalty = c.value("reference_policy_kl_penalty", 0.0);
  config.reference_policy_kl_type = kl_type_from(c.value("reference_policy_kl_type", "k3"));
  config.kl_input_clamp_value = c.value("kl_input_clamp_value", 20.0);
  config.kl_output_clamp_value = c.value("kl_output_clamp_value", 10.0);
  config.use_importance_sampling_correction = c.value("use_importance_sampling_correction", false);
  config.truncated_importance_sampling_type =
      importance_truncation_from(c.value("truncated_importance_sampling_type", "off"));
  if (c.contains("truncated_importance_sampling_ratio"))
    config.truncated_importance_sampling_ratio = c["truncated_importance_sampling_ratio"];
  if (c.contains("truncated_importance_sampling_ratio_min"))
    config.truncated_importance_sampling_ratio_min = c["truncated_importance_sampling_ratio_min"];
  return config;
}

}  // namespace lockstep::rl

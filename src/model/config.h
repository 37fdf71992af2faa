// What a decoder is made of: sizes, options and special tokens. One struct for all families; a
// family that lacks a part leaves it switched off. Read from and written to Hugging Face's
// config.json by model/hf_config.h.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ops/router.h"

namespace lockstep::model {

enum class Family { kQwen3Moe };
const char* family_name(Family family);

struct ModelConfig {
  Family family = Family::kQwen3Moe;
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t num_layers = 0;
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t max_positions = 0;
  double rope_theta = 10000.0;
  float rms_eps = 1e-6f;
  bool qk_norm = false;
  bool tie_word_embeddings = false;

  std::int64_t num_experts = 0;
  std::int64_t moe_intermediate_size = 0;
  ops::RouterOptions router;
  double router_aux_loss_coef = 0.001;

  double initializer_range = 0.02;
  std::int32_t bos_token_id = -1;
  std::vector<std::int32_t> eos_token_ids;
  std::int32_t pad_token_id = -1;
};

// Throws InputError (prefixed with `where`) naming the first value that cannot be: sizes not
// positive or beyond 2^31, heads that do not divide, top_k above the experts, odd head width and so
// on.
void validate(const ModelConfig& config, const std::string& where);

}  // namespace lockstep::model

// What a decoder is made of: sizes, options and special tokens. One struct for all families; a
// family that lacks a part leaves it switched off. Read from and written to Hugging Face's
// config.json by model/hf_config.h.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ops/router.h"

namespace lockstep::model {

enum class Family { kQwen3Moe, kMixtral, kOlmoe, kDeepseekV3, kQwen3, kLlama, kQwen2 };
const char* family_name(Family family);

// How the rotary embedding was stretched to longer texts (formulas: model/rope.h).
struct RopeScaling {
  enum Kind { kNone, kLinear, kLlama3, kYarn };
  Kind kind = kNone;
  double factor = 1;
  std::int64_t original_positions = 0;               // llama3, yarn
  double low_freq_factor = 1, high_freq_factor = 4;  // llama3
  double beta_fast = 32, beta_slow = 1;              // yarn
  double attention_factor = 1;                       // yarn: of cos and sin
  double mscale = 0, mscale_all_dim = 0;             // yarn, as the file has them; 0: absent
  bool truncate = true;                              // yarn: whole numbers as bounds of the ramp
};

// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): a token's keys and values come from
// one vector of kv_rank values, which is what the cache holds, beside one rotated key for all
// heads.
struct LatentAttention {
  std::int64_t kv_rank = 0;  // 0: the family has keys and values of its own
  std::int64_t q_rank = 0;   // queries come from such a vector, too; 0: straight from the layer
  std::int64_t nope = 0;     // width of a head's part without position
  std::int64_t value = 0;    // width of a head's value
  bool interleaved = true;   // rotation of the pairs (2i, 2i + 1) rather than (i, i + K/2)
};

// Of the norms of latent vectors, whatever rms_norm_eps says: so it is in DeepSeek's own code and
// in transformers.
inline constexpr float kLatentEps = 1e-6f;

struct ModelConfig {
  Family family = Family::kQwen3Moe;
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t num_layers = 0;
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;  // with latent attention: of the rotated part
  LatentAttention latent;
  std::int64_t max_positions = 0;
  double rope_theta = 10000.0;
  RopeScaling rope_scaling;
  float rms_eps = 1e-6f;
  bool qk_norm = false;        // RMSNorm of queries and keys, each head on its own
  bool qk_norm_whole = false;  // with qk_norm: one norm over all heads of a projection (OLMoE)
  bool qkv_bias = false;       // biases of the query, key and value projections
  bool output_bias = false;    // and of the attention's output projection
  // Queries and keys (behind their norms) and values are cut to [-clip_qkv, clip_qkv], rounded to
  // BF16; 0: not.
  double clip_qkv = 0;
  bool tie_word_embeddings = false;

  std::int64_t num_experts = 0;  // 0: every layer is dense
  std::int64_t moe_intermediate_size = 0;
  // Experts that every token takes with weight 1: one dense MLP of this many times the width.
  std::int64_t num_shared_experts = 0;
  // Dense layers have one MLP of this width instead of experts: the first first_dense_layers, those
  // of mlp_only_layers (ascending) and all but every decoder_sparse_step-th.
  std::int64_t intermediate_size = 0;
  std::int64_t first_dense_layers = 0;
  std::vector<std::int64_t> mlp_only_layers;
  std::int64_t decoder_sparse_step = 1;
  ops::RouterOptions router;
  double router_aux_loss_coef = 0.001;

  double initializer_range = 0.02;
  std::int32_t bos_token_id = -1;
  std::vector<std::int32_t> eos_token_ids;
  std::int32_t pad_token_id = -1;
};

// clip_qkv as the bound that values in BF16 are cut to.
numerics::Bf16 clip_limit(const ModelConfig& config);

bool is_dense(const ModelConfig& config, std::int64_t layer);
bool has_dense_layers(const ModelConfig& config);
inline bool is_latent(const ModelConfig& config) { return config.latent.kv_rank > 0; }

// Throws InputError (prefixed with `where`) naming the first value that cannot be: sizes not
// positive or beyond 2^31, heads that do not divide, top_k above the experts, odd head width and so
// on.
void validate(const ModelConfig& config, const std::string& where);

}  // namespace lockstep::model

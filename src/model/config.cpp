#include "model/config.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "numerics/formats.h"

namespace lockstep::model {

using base::fail;
using base::InputError;

const char* family_name(Family family) {
  switch (family) {
    case Family::kQwen3Moe:
      return "qwen3_moe";
    case Family::kMixtral:
      return "mixtral";
    case Family::kOlmoe:
      return "olmoe";
    case Family::kDeepseekV3:
      return "deepseek_v3";
    case Family::kQwen3:
      return "qwen3";
    case Family::kLlama:
      return "llama";
    case Family::kQwen2:
      return "qwen2";
  }
  fail<base::ContractError>("no model family {}", static_cast<int>(family));
}

numerics::Bf16 clip_limit(const ModelConfig& c) {
  return numerics::to_bf16(static_cast<float>(c.clip_qkv));
}

bool is_dense(const ModelConfig& c, std::int64_t layer) {
  return c.num_experts == 0 || layer < c.first_dense_layers ||
         (layer + 1) % c.decoder_sparse_step != 0 ||
         std::binary_search(c.mlp_only_layers.begin(), c.mlp_only_layers.end(), layer);
}

bool has_dense_layers(const ModelConfig& c) {
  return c.num_experts == 0 || c.first_dense_layers > 0 || c.decoder_sparse_step > 1 ||
         !c.mlp_only_layers.empty();
}

namespace {

constexpr std::int64_t kSizeLimit = std::int64_t{1} << 31;
// So that a config alone cannot exhaust memory: parts of the parameter table, elements of a slab.
constexpr std::int64_t kMaxExpertsInAll = std::int64_t{1} << 22;
constexpr double kMaxElements = 0x1p46;

void require_size(std::int64_t value, const char* name, const std::string& where) {
  if (value <= 0 || value >= kSizeLimit)
    fail<InputError>("{}: {} is {}, it must be from 1 to 2^31 - 1", where, name, value);
}

void require_token(std::int32_t id, const char* name, std::int64_t vocab,
                   const std::string& where) {
  if (id < -1 || id >= vocab)
    fail<InputError>("{}: {} is {}, the vocabulary has {} tokens", where, name, id, vocab);
}

void require_range(double value, bool zero_allowed, const char* name, const std::string& where) {
  if (!std::isfinite(value) || value < 0 || (value == 0 && !zero_allowed))
    fail<InputError>("{}: {} is {}, it must be finite and {} 0", where, name, value,
                     zero_allowed ? "not below" : "above");
}

const char* experts_key(const ModelConfig& c) {
  return c.family == Family::kDeepseekV3 ? "n_routed_experts" : "num_experts";
}

void validate_router(const ModelConfig& c, const std::string& where) {
  const ops::RouterOptions& r = c.router;
  if (r.top_k < 1 || r.top_k > c.num_experts)
    fail<InputError>("{}: num_experts_per_tok is {}, it must be from 1 to {} ({})", where, r.top_k,
                     experts_key(c), c.num_experts);
  if (r.groups < 1 || c.num_experts % r.groups != 0)
    fail<InputError>("{}: n_group is {}, it must divide {} ({})", where, r.groups, experts_key(c),
                     c.num_experts);
  if (r.top_groups < 1 || r.top_groups > r.groups)
    fail<InputError>("{}: topk_group is {}, it must be from 1 to n_group ({})", where, r.top_groups,
                     r.groups);
  if (r.top_k > c.num_experts / r.groups * r.top_groups)
    fail<InputError>("{}: num_experts_per_tok is {}, the {} chosen groups hold only {} experts",
                     where, r.top_k, r.top_groups, c.num_experts / r.groups * r.top_groups);
  require_range(r.scaling, false, "routed_scaling_factor", where);
}

void validate_rope_scaling(const RopeScaling& s, const std::string& where) {
  if (s.kind == RopeScaling::kNone) return;
  require_range(s.factor, false, "rope_scaling.factor", where);
  if (s.kind == RopeScaling::kLinear) return;
  require_size(s.original_positions, "rope_scaling.original_max_position_embeddings", where);
  if (s.kind == RopeScaling::kLlama3) {
    require_range(s.low_freq_factor, false, "rope_scaling.low_freq_factor", where);
    require_range(s.high_freq_factor, false, "rope_scaling.high_freq_factor", where);
    if (s.high_freq_factor <= s.low_freq_factor)
      fail<InputError>("{}: rope_scaling.high_freq_factor ({}) must be above low_freq_factor ({})",
                       where, s.high_freq_factor, s.low_freq_factor);
    return;
  }
  require_range(s.beta_fast, false, "rope_scaling.beta_fast", where);
  require_range(s.beta_slow, false, "rope_scaling.beta_slow", where);
  require_range(s.attention_factor, false, "rope_scaling.attention_factor", where);
  require_range(s.mscale, true, "rope_scaling.mscale", where);
  require_range(s.mscale_all_dim, true, "rope_scaling.mscale_all_dim", where);
  if (s.beta_fast < s.beta_slow)
    fail<InputError>("{}: rope_scaling.beta_fast ({}) is below beta_slow ({})", where, s.beta_fast,
                     s.beta_slow);
}

// Which layers have experts, and the widths of both kinds.
void validate_mlps(const ModelConfig& c, const std::string& where) {
  const bool dense_family =
      c.family == Family::kQwen3 || c.family == Family::kLlama || c.family == Family::kQwen2;
  if (!dense_family) {
    require_size(c.num_experts, experts_key(c), where);
    require_size(c.moe_intermediate_size, "moe_intermediate_size", where);
    validate_router(c, where);
  } else if (c.num_experts != 0) {
    fail<InputError>("{}: num_experts is {}, {} has none", where, c.num_experts,
                     family_name(c.family));
  }
  if (c.num_shared_experts != 0) require_size(c.num_shared_experts, "n_shared_experts", where);
  if (c.first_dense_layers != 0) require_size(c.first_dense_layers, "first_k_dense_replace", where);
  require_size(c.decoder_sparse_step, "decoder_sparse_step", where);
  std::int64_t before = -1;
  for (const std::int64_t l : c.mlp_only_layers) {
    if (l <= before || l >= c.num_layers)
      fail<InputError>(
          "{}: mlp_only_layers holds {}: the layers must be different and from 0 to {}", where, l,
          c.num_layers - 1);
    before = l;
  }
  if (has_dense_layers(c)) require_size(c.intermediate_size, "intermediate_size", where);
}

void validate_latent(const ModelConfig& c, const std::string& where) {
  if (!is_latent(c)) return;
  const LatentAttention& a = c.latent;
  require_size(a.kv_rank, "kv_lora_rank", where);
  if (a.q_rank != 0) require_size(a.q_rank, "q_lora_rank", where);
  require_size(a.nope, "qk_nope_head_dim", where);
  require_size(a.value, "v_head_dim", where);
  if (c.num_kv_heads != c.num_heads)
    fail<InputError>("{}: num_key_value_heads ({}) is not num_attention_heads ({})", where,
                     c.num_kv_heads, c.num_heads);
}

// Parameters of one layer's attention.
double attention_elements(const ModelConfig& c) {
  const auto hidden = static_cast<double>(c.hidden_size), heads = static_cast<double>(c.num_heads),
             width = static_cast<double>(c.head_dim);
  if (!is_latent(c)) return hidden * width * (heads + static_cast<double>(c.num_kv_heads)) * 2;
  const auto latent = static_cast<double>(c.latent.kv_rank),
             nope = static_cast<double>(c.latent.nope), value = static_cast<double>(c.latent.value),
             q_rank = static_cast<double>(c.latent.q_rank), q = heads * (nope + width);
  return (q_rank == 0 ? hidden * q : q_rank * (hidden + q)) + hidden * (latent + width) +
         latent * heads * (nope + value) + heads * value * hidden;
}

}  // namespace

void validate(const ModelConfig& c, const std::string& where) {
  require_size(c.vocab_size, "vocab_size", where);
  require_size(c.hidden_size, "hidden_size", where);
  require_size(c.num_layers, "num_hidden_layers", where);
  require_size(c.num_heads, "num_attention_heads", where);
  require_size(c.num_kv_heads, "num_key_value_heads", where);
  require_size(c.head_dim, "head_dim", where);
  require_size(c.max_positions, "max_position_embeddings", where);
  if (c.num_heads % c.num_kv_heads != 0)
    fail<InputError>("{}: num_attention_heads ({}) is not a multiple of num_key_value_heads ({})",
                     where, c.num_heads, c.num_kv_heads);
  if (c.head_dim % 2 != 0)
    fail<InputError>("{}: {} is {}, the rotary embedding needs an even number", where,
                     is_latent(c) ? "qk_rope_head_dim" : "head_dim", c.head_dim);
  validate_latent(c, where);
  require_range(c.rope_theta, false, "rope_theta", where);
  require_range(c.rms_eps, false, "rms_norm_eps", where);
  require_range(c.initializer_range, true, "initializer_range", where);
  require_range(c.clip_qkv, true, "clip_qkv", where);
  if (const float limit = numerics::to_float(clip_limit(c));
      c.clip_qkv > 0 && !(limit > 0 && std::isfinite(limit)))
    fail<InputError>("{}: clip_qkv {} is no BF16 number above 0", where, c.clip_qkv);
  require_range(c.router_aux_loss_coef, true, "router_aux_loss_coef", where);
  validate_rope_scaling(c.rope_scaling, where);
  validate_mlps(c, where);

  require_token(c.bos_token_id, "bos_token_id", c.vocab_size, where);
  require_token(c.pad_token_id, "pad_token_id", c.vocab_size, where);
  for (const std::int32_t id : c.eos_token_ids) {
    if (id < 0) fail<InputError>("{}: eos_token_id is {}", where, id);
    require_token(id, "eos_token_id", c.vocab_size, where);
  }

  if (c.num_layers > kMaxExpertsInAll / std::max<std::int64_t>(1, c.num_experts))
    fail<InputError>("{}: num_hidden_layers ({}) x num_experts ({}) is over the limit of {}", where,
                     c.num_layers, c.num_experts, kMaxExpertsInAll);
  const double hidden = static_cast<double>(c.hidden_size);
  const double experts =
      std::max(static_cast<double>(c.num_experts + c.num_shared_experts) *
                   (static_cast<double>(c.moe_intermediate_size) * 3 + 1),
               has_dense_layers(c) ? static_cast<double>(c.intermediate_size) * 3 : 0.0);
  const double elements = hidden * (static_cast<double>(c.vocab_size) * 2 +
                                    static_cast<double>(c.num_layers) * experts) +
                          static_cast<double>(c.num_layers) * attention_elements(c);
  if (elements > kMaxElements)
    fail<InputError>("{}: the sizes make {:.3g} parameters, the limit is {:.3g}", where, elements,
                     kMaxElements);
  const double rope = static_cast<double>(c.max_positions) * static_cast<double>(c.head_dim);
  if (rope > 0x1p34)
    fail<InputError>("{}: max_position_embeddings ({}) x head_dim ({}) is over the limit of 2^34",
                     where, c.max_positions, c.head_dim);
}

}  // namespace lockstep::model

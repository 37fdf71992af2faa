// One small config as every family has it, for tests that must hold for all of them.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "base/philox.h"
#include "model/config.h"
#include "model/weights.h"

namespace lockstep::model {

struct FamilyCase {
  std::string name;
  ModelConfig config;
};

// `base` is a Qwen3-MoE. The sizes stay, the options become the family's.
inline std::vector<FamilyCase> family_cases(const ModelConfig& base) {
  std::vector<FamilyCase> out = {{"qwen3_moe", base}};
  const auto add = [&](const char* name, Family family) -> ModelConfig& {
    out.push_back({name, base});
    out.back().config.family = family;
    return out.back().config;
  };
  {
    ModelConfig& c = add("qwen3_moe, dense first layer", Family::kQwen3Moe);
    c.mlp_only_layers = {0};
    c.intermediate_size = 2 * base.moe_intermediate_size + 2;
    c.rope_scaling.kind = RopeScaling::kYarn;
    c.rope_scaling.factor = 4;
    c.rope_scaling.original_positions = base.max_positions / 4;
    c.rope_scaling.attention_factor = 1.138;
  }
  {
    ModelConfig& c = add("mixtral, tied", Family::kMixtral);
    c.qk_norm = false;
    c.router.normalize = true;
    c.tie_word_embeddings = true;
    c.num_experts = 5;
    c.router.top_k = 3;
  }
  {
    ModelConfig& c = add("olmoe", Family::kOlmoe);
    c.qk_norm_whole = true;
    c.router.normalize = false;
    c.num_kv_heads = c.num_heads;
    c.head_dim = c.hidden_size / c.num_heads;
  }
  for (const bool q_latent : {true, false}) {
    ModelConfig& c = add(q_latent ? "deepseek_v3" : "deepseek_v3 without a latent of the queries",
                         Family::kDeepseekV3);
    c.qk_norm = false;
    c.num_kv_heads = c.num_heads;
    c.num_experts = 6;
    c.num_shared_experts = q_latent ? 1 : 2;
    c.first_dense_layers = q_latent ? 1 : 0;
    c.intermediate_size = 2 * base.moe_intermediate_size + 16;
    c.router = {ops::RouterScore::kSigmoid, 2, q_latent ? 3 : 1, q_latent ? 2 : 1, true, 2.5f};
    c.latent = {48, q_latent ? 80 : 0, 32, 24, q_latent};
    if (q_latent) continue;
    c.rope_scaling.kind = RopeScaling::kYarn;
    c.rope_scaling.factor = 4;
    c.rope_scaling.original_positions = base.max_positions / 4;
    c.rope_scaling.mscale = 0.7, c.rope_scaling.mscale_all_dim = 1.0;
    c.rope_scaling.attention_factor =
        (0.1 * 0.7 * std::log(4.0) + 1) / (0.1 * 1.0 * std::log(4.0) + 1);
  }
  {
    ModelConfig& c = add("olmoe, clipped, biases", Family::kOlmoe);
    c.qk_norm_whole = true;
    c.router.normalize = false;
    c.num_kv_heads = c.num_heads;
    c.head_dim = c.hidden_size / c.num_heads;
    c.clip_qkv = 0.75;
    c.qkv_bias = c.output_bias = true;
  }
  for (const Family family : {Family::kQwen3, Family::kLlama, Family::kQwen2}) {
    ModelConfig& c = add(family_name(family), family);
    c.qk_norm = family == Family::kQwen3;
    c.num_experts = c.moe_intermediate_size = 0;
    c.router = {};
    c.intermediate_size = 2 * base.moe_intermediate_size + 2;
    c.qkv_bias = family != Family::kLlama;
    c.output_bias = family == Family::kQwen3;
    if (family == Family::kQwen2) c.head_dim = c.hidden_size / c.num_heads;
    if (family != Family::kLlama) continue;
    c.rope_scaling.kind = RopeScaling::kLlama3;
    c.rope_scaling.factor = 8;
    c.rope_scaling.original_positions = base.max_positions / 8;
  }
  return out;
}

// Biases are zero in a fresh model; here they matter.
inline void randomize_biases(Weights& w) {
  for (std::size_t p = 0; p < w.table.params.size(); ++p)
    if (const Param& param = w.table.params[p]; param.kind == ParamKind::kBias)
      for (const ParamPart& part : param.parts)
        for (std::int64_t r = 0; r < part.rows; ++r)
          w.view(static_cast<int>(p)).as<numerics::Bf16>()[part.row + r] = numerics::to_bf16(
              static_cast<float>(base::philox4x32(5, p, static_cast<std::uint64_t>(r)).word[0]) *
                  0x1p-32f -
              0.5f);
}

}  // namespace lockstep::model

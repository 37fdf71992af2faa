// config.json of the DeepSeek-V3 family.
#include "model/hf_families.h"

namespace lockstep::model {

using nlohmann::json;

namespace {

void read_latent(KeyReader& r, ModelConfig& c) {
  LatentAttention& a = c.latent;
  a.kv_rank = r.integer("kv_lora_rank");
  a.q_rank = r.integer("q_lora_rank", 0);
  a.nope = r.integer("qk_nope_head_dim");
  a.value = r.integer("v_head_dim");
  a.interleaved = r.boolean("rope_interleave", true);
  c.head_dim = r.integer("qk_rope_head_dim");
  if (a.kv_rank < 1) r.refuse("kv_lora_rank", "{} must be at least 1", a.kv_rank);
  if (a.q_rank < 0) r.refuse("q_lora_rank", "{} must be at least 1, or null", a.q_rank);
  // Both follow from the others.
  if (r.integer("head_dim", c.head_dim) != c.head_dim)
    r.refuse("head_dim", "contradicts qk_rope_head_dim ({})", c.head_dim);
  const json* width = r.find("qk_head_dim");
  if (width == nullptr) return;
  const std::int64_t both = r.whole("qk_head_dim", *width);
  if (a.nope < 0 || a.nope > both || both - a.nope != c.head_dim)
    r.refuse("qk_head_dim", "{} is not qk_nope_head_dim ({}) + qk_rope_head_dim ({})", both, a.nope,
             c.head_dim);
}

}  // namespace

ModelConfig read_deepseek_v3(KeyReader& r) {
  ModelConfig c;
  c.family = Family::kDeepseekV3;
  read_common(r, c);
  r.only("attention_bias", false);
  read_latent(r, c);
  c.num_experts = r.integer("n_routed_experts");
  c.moe_intermediate_size = r.integer("moe_intermediate_size");
  c.num_shared_experts = r.integer("n_shared_experts", 0);
  c.intermediate_size = r.integer("intermediate_size", 0);  // of dense layers
  c.first_dense_layers = r.integer("first_k_dense_replace");
  r.only("moe_layer_freq", 1);
  // transformers has the sigmoid router with a selection bias alone and no key for it.
  r.only("scoring_func", "sigmoid");
  r.only("topk_method", "noaux_tc");
  c.router.score = ops::RouterScore::kSigmoid;
  c.router.top_k = r.small_integer("num_experts_per_tok", r.integer("num_experts_per_tok"));
  c.router.groups = r.small_integer("n_group", r.integer("n_group"));
  c.router.top_groups = r.small_integer("topk_group", r.integer("topk_group"));
  c.router.normalize = r.boolean("norm_topk_prob", true);
  c.router.scaling = static_cast<float>(r.number("routed_scaling_factor"));
  c.router_aux_loss_coef = r.number("aux_loss_alpha", 0.001);
  // How a computation is split, what a loss counts over; and layers that predict further tokens,
  // whose weights are passed over (model/checkpoint.h).
  r.skip({"pretraining_tp", "ep_size", "seq_aux", "num_nextn_predict_layers"});
  return c;
}

json deepseek_v3_json(const ModelConfig& c) {
  const LatentAttention& a = c.latent;
  return {
      {"aux_loss_alpha", c.router_aux_loss_coef},
      {"first_k_dense_replace", c.first_dense_layers},
      {"head_dim", c.head_dim},
      {"intermediate_size",
       c.intermediate_size > 0 ? c.intermediate_size : c.moe_intermediate_size},
      {"kv_lora_rank", a.kv_rank},
      {"moe_intermediate_size", c.moe_intermediate_size},
      {"moe_layer_freq", 1},
      {"n_group", c.router.groups},
      {"n_routed_experts", c.num_experts},
      {"n_shared_experts", c.num_shared_experts > 0 ? json(c.num_shared_experts) : json(nullptr)},
      {"norm_topk_prob", c.router.normalize},
      {"num_experts_per_tok", c.router.top_k},
      {"num_nextn_predict_layers", 0},
      {"q_lora_rank", a.q_rank > 0 ? json(a.q_rank) : json(nullptr)},
      {"qk_head_dim", a.nope + c.head_dim},
      {"qk_nope_head_dim", a.nope},
      {"qk_rope_head_dim", c.head_dim},
      {"rope_interleave", a.interleaved},
      {"routed_scaling_factor", std::stod(fmt::format("{}", c.router.scaling))},
      {"scoring_func", "sigmoid"},
      {"topk_group", c.router.top_groups},
      {"topk_method", "noaux_tc"},
      {"v_head_dim", a.value}};
}

}  // namespace lockstep::model

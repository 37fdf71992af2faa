#include "model/hf_families.h"

#include <algorithm>

#include "model/hf_rope.h"

namespace lockstep::model {

using nlohmann::json;

namespace {

std::int64_t read_num_experts(KeyReader& r) {
  if (!r.has("num_local_experts")) return r.integer("num_experts");
  const std::int64_t local = r.integer("num_local_experts");
  if (r.integer("num_experts", local) != local)
    r.refuse("num_experts", "contradicts num_local_experts ({})", local);
  return local;
}

// auto_map names Python code that would replace transformers' own; nothing of it is run. DeepSeek's
// published files name the code that this family came with before transformers had it.
void refuse_foreign_code(KeyReader& r, Family family) {
  const json* map = r.find("auto_map");
  if (map == nullptr || map->empty()) return;
  if (family == Family::kDeepseekV3 && map->is_object())
    if (std::all_of(map->begin(), map->end(), [](const json& code) {
          return code == "configuration_deepseek.DeepseekV3Config" ||
                 code == "modeling_deepseek.DeepseekV3Model" ||
                 code == "modeling_deepseek.DeepseekV3ForCausalLM";
        }))
      return;
  r.refuse("auto_map", "not supported");
}

// Biases of the attention's projections: an option of most families, for all four together. Qwen2
// has three of them whatever its file says, Mixtral none.
void read_attention_bias(KeyReader& r, ModelConfig& c) {
  switch (c.family) {
    case Family::kQwen3Moe:
    case Family::kOlmoe:
    case Family::kQwen3:
    case Family::kLlama:
      c.qkv_bias = c.output_bias = r.boolean("attention_bias", false);
      return;
    case Family::kQwen2:
      c.qkv_bias = true;
      return r.skip({"attention_bias"});
    default:
      return r.only("attention_bias", false);
  }
}

}  // namespace

void read_common(KeyReader& r, ModelConfig& c, double theta_fallback) {
  c.vocab_size = r.integer("vocab_size");
  c.hidden_size = r.integer("hidden_size");
  c.num_layers = r.integer("num_hidden_layers");
  c.num_heads = r.integer("num_attention_heads");
  c.num_kv_heads = r.integer("num_key_value_heads", c.num_heads);
  c.max_positions = r.integer("max_position_embeddings");
  c.head_dim = r.integer("head_dim", c.num_heads > 0 ? c.hidden_size / c.num_heads : 0);
  read_rope(r, c, theta_fallback);
  c.rms_eps = static_cast<float>(r.number("rms_norm_eps"));
  c.tie_word_embeddings = r.boolean("tie_word_embeddings", false);
  c.initializer_range = r.number("initializer_range", 0.02);
  c.bos_token_id = r.small_integer("bos_token_id", r.integer("bos_token_id", -1));
  c.pad_token_id = r.small_integer("pad_token_id", r.integer("pad_token_id", -1));
  c.eos_token_ids = r.tokens("eos_token_id");

  r.only("hidden_act", "silu");
  read_attention_bias(r, c);
  r.only("attention_dropout", 0.0);
  r.only("is_encoder_decoder", false);
  r.only("add_cross_attention", false);
  for (const char* key : {"compression_config", "pruned_heads"})
    if (const json* value = r.find(key); value != nullptr && !value->empty())
      r.refuse(key, "not supported");
  refuse_foreign_code(r, c.family);
  const std::string dtype = r.text("dtype", r.text("torch_dtype", "bfloat16"));
  r.skip({"torch_dtype"});
  if (dtype != "bfloat16" && dtype != "float16" && dtype != "float32")
    r.refuse("dtype", "'{}' is not supported, only bfloat16, float16 and float32", dtype);
  // How to sample, and who wrote the file.
  r.skip({"max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p",
          "repetition_penalty", "num_beams", "num_return_sequences", "sep_token_id",
          "tokenizer_class", "finetuning_task", "task_specific_params", "torchscript",
          "unsloth_version", "unsloth_fixed"});
  r.skip({"architectures", "model_type", "transformers_version", "use_cache",
          "output_router_logits", "output_attentions", "output_hidden_states", "return_dict",
          "id2label", "label2id", "problem_type", "chunk_size_feed_forward"});
}

namespace {

void read_router(KeyReader& r, ModelConfig& c, double aux_loss_coef) {
  c.num_experts = read_num_experts(r);
  c.router.score = ops::RouterScore::kSoftmax;
  c.router.top_k = r.small_integer("num_experts_per_tok", r.integer("num_experts_per_tok"));
  c.router_aux_loss_coef = r.number("router_aux_loss_coef", aux_loss_coef);
}

// A window of attention that is narrower than the model's positions is refused; a wider one, or
// none, changes nothing.
void refuse_window(KeyReader& r, const ModelConfig& c) {
  const std::int64_t window = r.integer("sliding_window", c.max_positions);
  if (window < c.max_positions)
    r.refuse("sliding_window",
             "windows of attention are not supported; sequences of up to {} tokens do not need "
             "one: set max_position_embeddings ({}) to {} and sliding_window to null to run those",
             window, c.max_positions, window);
}

// The same for Qwen, where use_sliding_window switches it on and layer_types says where.
void refuse_qwen_window(KeyReader& r, const ModelConfig& c) {
  r.skip({"sliding_window", "max_window_layers", "layer_types"});
  if (r.boolean("use_sliding_window", false)) return refuse_window(r, c);
  if (const json* types = r.find("layer_types"))
    for (const json& type : *types)
      if (type != "full_attention") r.refuse("layer_types", "{} is not supported", type.dump());
}

ModelConfig read_qwen3_moe(KeyReader& r) {
  ModelConfig c;
  c.family = Family::kQwen3Moe;
  c.qk_norm = true;
  read_common(r, c);
  read_router(r, c, 0.001);
  c.moe_intermediate_size = r.integer("moe_intermediate_size");
  c.router.normalize = r.boolean("norm_topk_prob", false);
  c.intermediate_size = r.integer("intermediate_size", 0);  // of dense layers
  c.decoder_sparse_step = r.integer("decoder_sparse_step", 1);
  if (const json* layers = r.find("mlp_only_layers")) {
    if (!layers->is_array()) r.refuse("mlp_only_layers", "expected a list of layers");
    for (const json& layer : *layers)
      c.mlp_only_layers.push_back(r.whole("mlp_only_layers", layer));
    std::sort(c.mlp_only_layers.begin(), c.mlp_only_layers.end());
  }
  refuse_qwen_window(r, c);
  return c;
}

json qwen3_moe_json(const ModelConfig& c) {
  return {{"decoder_sparse_step", c.decoder_sparse_step},
          {"head_dim", c.head_dim},
          {"intermediate_size",
           c.intermediate_size > 0 ? c.intermediate_size : c.moe_intermediate_size},
          {"mlp_only_layers", c.mlp_only_layers},
          {"moe_intermediate_size", c.moe_intermediate_size},
          {"norm_topk_prob", c.router.normalize},
          {"num_experts", c.num_experts},
          {"num_experts_per_tok", c.router.top_k},
          {"router_aux_loss_coef", c.router_aux_loss_coef},
          {"sliding_window", nullptr},
          {"use_sliding_window", false}};
}

ModelConfig read_mixtral(KeyReader& r) {
  ModelConfig c;
  c.family = Family::kMixtral;
  read_common(r, c);
  read_router(r, c, 0.001);
  c.moe_intermediate_size = r.integer("intermediate_size");
  c.router.normalize = true;
  r.only("router_jitter_noise", 0.0);
  refuse_window(r, c);
  return c;
}

json mixtral_json(const ModelConfig& c) {
  return {{"head_dim", c.head_dim},
          {"intermediate_size", c.moe_intermediate_size},
          {"num_experts_per_tok", c.router.top_k},
          {"num_local_experts", c.num_experts},
          {"router_aux_loss_coef", c.router_aux_loss_coef},
          {"router_jitter_noise", 0.0},
          {"sliding_window", nullptr}};
}

ModelConfig read_olmoe(KeyReader& r) {
  ModelConfig c;
  c.family = Family::kOlmoe;
  c.qk_norm = c.qk_norm_whole = true;
  read_common(r, c);
  read_router(r, c, 0.01);
  if (c.num_heads > 0 && c.head_dim != c.hidden_size / c.num_heads)
    r.refuse("head_dim", "{} is not hidden_size / num_attention_heads", c.head_dim);
  c.moe_intermediate_size = r.integer("intermediate_size");
  c.router.normalize = r.boolean("norm_topk_prob", false);
  c.clip_qkv = r.number("clip_qkv", 0);
  if (r.has("clip_qkv") && !(c.clip_qkv > 0))
    r.refuse("clip_qkv", "{} must be above 0", c.clip_qkv);
  return c;
}

json olmoe_json(const ModelConfig& c) {
  return {{"clip_qkv", c.clip_qkv > 0 ? json(c.clip_qkv) : json(nullptr)},
          {"intermediate_size", c.moe_intermediate_size},
          {"norm_topk_prob", c.router.normalize},
          {"num_experts", c.num_experts},
          {"num_experts_per_tok", c.router.top_k},
          {"router_aux_loss_coef", c.router_aux_loss_coef}};
}

ModelConfig read_qwen3(KeyReader& r) {
  ModelConfig c;
  c.family = Family::kQwen3;
  c.qk_norm = true;
  read_common(r, c);
  c.intermediate_size = r.integer("intermediate_size");
  refuse_qwen_window(r, c);
  return c;
}

// Biases of queries, keys and values, always.
ModelConfig read_qwen2(KeyReader& r) {
  ModelConfig c;
  c.family = Family::kQwen2;
  read_common(r, c);
  if (c.num_heads > 0 && c.head_dim != c.hidden_size / c.num_heads)
    r.refuse("head_dim", "{} is not hidden_size / num_attention_heads", c.head_dim);
  c.intermediate_size = r.integer("intermediate_size");
  r.only("use_mrope", false);
  refuse_qwen_window(r, c);
  return c;
}

json qwen3_json(const ModelConfig& c) {
  return {{"head_dim", c.head_dim},
          {"intermediate_size", c.intermediate_size},
          {"sliding_window", nullptr},
          {"use_sliding_window", false}};
}

json qwen2_json(const ModelConfig& c) {
  return {{"intermediate_size", c.intermediate_size},
          {"sliding_window", nullptr},
          {"use_sliding_window", false}};
}

ModelConfig read_llama(KeyReader& r) {
  ModelConfig c;
  c.family = Family::kLlama;
  read_common(r, c, 10000.0);  // files older than rope_theta
  c.intermediate_size = r.integer("intermediate_size");
  r.only("mlp_bias", false);
  r.only("rope_interleaved", false);
  // How a computation is split; of a file of another layout; for another library.
  r.skip({"pretraining_tp", "is_llama_config", "transformers.js_config"});
  return c;
}

json llama_json(const ModelConfig& c) {
  return {
      {"head_dim", c.head_dim}, {"intermediate_size", c.intermediate_size}, {"mlp_bias", false}};
}

constexpr HfFamily kFamilies[] = {
    {Family::kQwen3Moe, "Qwen3MoeForCausalLM", read_qwen3_moe, qwen3_moe_json},
    {Family::kMixtral, "MixtralForCausalLM", read_mixtral, mixtral_json},
    {Family::kOlmoe, "OlmoeForCausalLM", read_olmoe, olmoe_json},
    {Family::kDeepseekV3, "DeepseekV3ForCausalLM", read_deepseek_v3, deepseek_v3_json},
    {Family::kQwen3, "Qwen3ForCausalLM", read_qwen3, qwen3_json},
    {Family::kLlama, "LlamaForCausalLM", read_llama, llama_json},
    {Family::kQwen2, "Qwen2ForCausalLM", read_qwen2, qwen2_json},
};

}  // namespace

const HfFamily& hf_family(KeyReader& r) {
  std::string known;
  for (const HfFamily& row : kFamilies) known += fmt::format(" {}", row.architecture);
  const json* list = r.find("architectures");
  if (list == nullptr || !list->is_array() || list->size() != 1 || !list->at(0).is_string())
    r.refuse("architectures", "expected a list of one name; supported:{}", known);
  const std::string name = list->at(0);
  for (const HfFamily& row : kFamilies) {
    if (name != row.architecture) continue;
    // Kimi-K2 has a name of its own for the same model.
    if (row.family != Family::kDeepseekV3 || r.text("model_type", "") != "kimi_k2")
      r.only("model_type", family_name(row.family));
    return row;
  }
  r.refuse("architectures", "'{}' is not supported; supported:{}", name, known);
}

const HfFamily& hf_family(Family family) {
  for (const HfFamily& row : kFamilies)
    if (row.family == family) return row;
  base::fail<base::ContractError>("no config.json of model family {}", static_cast<int>(family));
}

}  // namespace lockstep::model

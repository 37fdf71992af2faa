#include "model/hf_config.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "base/error.h"
#include "model/fp8_format.h"
#include "model/rope.h"
#include "model/strict_json.h"

namespace lockstep::model {

using base::fail;
using base::InputError;
using nlohmann::json;

namespace {

// Reads keys of one JSON object and remembers which, so that finish() can refuse the rest. A key
// that is null counts as absent, as transformers writes options that are off.
class KeyReader {
 public:
  KeyReader(const json& object, std::string file, std::string prefix = "")
      : object_(object), file_(std::move(file)), prefix_(std::move(prefix)) {}

  const std::string& file() const { return file_; }
  bool has(const char* key) const { return object_.contains(key) && !object_.at(key).is_null(); }

  const json* find(const char* key) {
    used_.insert(key);
    return has(key) ? &object_.at(key) : nullptr;
  }

  template <typename... Args>
  [[noreturn]] void refuse(const char* key, fmt::format_string<Args...> format,
                           Args&&... args) const {
    fail<InputError>("{}: {}{}: {}", file_, prefix_, key,
                     fmt::format(format, std::forward<Args>(args)...));
  }

  std::int64_t integer(const char* key) {
    const json* value = find(key);
    if (value == nullptr) refuse(key, "missing, expected a whole number");
    return whole(key, *value);
  }
  std::int64_t integer(const char* key, std::int64_t fallback) {
    const json* value = find(key);
    return value == nullptr ? fallback : whole(key, *value);
  }
  // A value that a later check narrows to int.
  std::int32_t small_integer(const char* key, std::int64_t value) {
    if (value < std::numeric_limits<std::int32_t>::min() ||
        value > std::numeric_limits<std::int32_t>::max())
      refuse(key, "{} does not fit 32 bits", value);
    return static_cast<std::int32_t>(value);
  }
  double number(const char* key, double fallback) {
    const json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_number()) refuse(key, "expected a number, found {}", value->dump());
    return value->get<double>();
  }
  double number(const char* key) {
    if (!has(key)) refuse(key, "missing, expected a number");
    return number(key, 0.0);
  }
  bool boolean(const char* key, bool fallback) {
    const json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_boolean()) refuse(key, "expected true or false, found {}", value->dump());
    return value->get<bool>();
  }
  std::string text(const char* key, const std::string& fallback) {
    const json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_string()) refuse(key, "expected a string, found {}", value->dump());
    return value->get<std::string>();
  }
  // One token or a list of them; empty when absent.
  std::vector<std::int32_t> tokens(const char* key) {
    std::vector<std::int32_t> ids;
    const json* value = find(key);
    if (value == nullptr) return ids;
    if (!value->is_array()) return {small_integer(key, whole(key, *value))};
    for (const json& id : *value) ids.push_back(small_integer(key, whole(key, id)));
    return ids;
  }
  // The key may be absent or hold `supported`, nothing else.
  void only(const char* key, const json& supported) {
    const json* value = find(key);
    if (value != nullptr && *value != supported)
      refuse(key, "{} is not supported, only {}", value->dump(), supported.dump());
  }
  void absent(const char* key) {
    if (find(key) != nullptr) refuse(key, "not supported");
  }
  void skip(std::initializer_list<const char*> keys) {
    for (const char* key : keys) used_.insert(key);
  }

  void finish() const {
    for (const auto& [key, value] : object_.items())
      if (!used_.count(key) && !key.starts_with('_') && !value.is_null())
        refuse(key.c_str(),
               "not a known key; if it does not change what the model computes, remove it");
  }

  std::int64_t whole(const char* key, const json& value) const {
    if (!value.is_number_integer()) refuse(key, "expected a whole number, found {}", value.dump());
    if (value.is_number_unsigned() && value.get<std::uint64_t>() > std::uint64_t{1} << 62)
      refuse(key, "{} is too large", value.dump());
    return value.get<std::int64_t>();
  }

 private:
  const json& object_;
  std::string file_, prefix_;
  std::set<std::string, std::less<>> used_;
};

// yarn's factor of cos and sin: given, or from the scaling.
double read_attention_factor(KeyReader& rope, double factor) {
  const double all = rope.number("mscale_all_dim", 0), mscale = rope.number("mscale", 0);
  double own = yarn_attention_factor(factor);
  if (mscale != 0 && all != 0)
    own = yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, all);
  return rope.number("attention_factor", own);
}

// The keys of rope_scaling or rope_parameters behind the kind.
RopeScaling read_rope_scaling(KeyReader& rope, std::int64_t max_positions) {
  RopeScaling s;
  const char* key = rope.has("rope_type") ? "rope_type" : "type";
  const std::string kind = rope.text(key, "default");
  if (rope.text("type", kind) != kind) rope.refuse("type", "contradicts rope_type ('{}')", kind);
  rope.only("partial_rotary_factor", 1.0);
  if (kind == "default") return s;
  s.factor = rope.number("factor");
  if (kind == "linear") {
    s.kind = RopeScaling::kLinear;
  } else if (kind == "llama3") {
    s.kind = RopeScaling::kLlama3;
    s.original_positions = rope.integer("original_max_position_embeddings");
    s.low_freq_factor = rope.number("low_freq_factor");
    s.high_freq_factor = rope.number("high_freq_factor");
  } else if (kind == "yarn") {
    s.kind = RopeScaling::kYarn;
    s.original_positions = rope.integer("original_max_position_embeddings", max_positions);
    s.beta_fast = rope.number("beta_fast", 32);
    s.beta_slow = rope.number("beta_slow", 1);
    s.truncate = rope.boolean("truncate", true);
    s.attention_factor = read_attention_factor(rope, s.factor);
  } else {
    rope.refuse(key, "'{}' is not supported, only default, linear, llama3 and yarn", kind);
  }
  return s;
}

// transformers 4 writes rope_theta and rope_scaling, 5 an object rope_parameters. A theta_fallback
// of 0: there is none.
void read_rope(KeyReader& r, ModelConfig& c, double theta_fallback) {
  const auto theta = [&](KeyReader& from) {
    return theta_fallback == 0 ? from.number("rope_theta")
                               : from.number("rope_theta", theta_fallback);
  };
  const bool parameters = r.has("rope_parameters");
  if (parameters) r.absent("rope_scaling");
  const char* key = parameters ? "rope_parameters" : "rope_scaling";
  const json* object = r.find(key);
  r.skip({"rope_parameters", "rope_scaling", "rope_theta"});
  if (object == nullptr) {
    c.rope_theta = theta(r);
    return;
  }
  if (!object->is_object()) r.refuse(key, "expected an object");
  KeyReader rope(*object, r.file(), std::string(key) + ".");
  c.rope_scaling = read_rope_scaling(rope, c.max_positions);
  const bool inside = parameters || rope.has("rope_theta");
  c.rope_theta = inside ? theta(rope) : theta(r);
  rope.skip({"rope_theta"});
  rope.finish();
  if (inside && r.has("rope_theta") && r.number("rope_theta") != c.rope_theta)
    r.refuse("rope_theta", "{} contradicts {}.rope_theta ({})", r.number("rope_theta"), key,
             c.rope_theta);
}

json rope_scaling_json(const RopeScaling& s) {
  switch (s.kind) {
    case RopeScaling::kNone:
      return nullptr;
    case RopeScaling::kLinear:
      return {{"rope_type", "linear"}, {"factor", s.factor}};
    case RopeScaling::kLlama3:
      return {{"rope_type", "llama3"},
              {"factor", s.factor},
              {"original_max_position_embeddings", s.original_positions},
              {"low_freq_factor", s.low_freq_factor},
              {"high_freq_factor", s.high_freq_factor}};
    case RopeScaling::kYarn:
      return {{"rope_type", "yarn"},
              {"factor", s.factor},
              {"original_max_position_embeddings", s.original_positions},
              {"beta_fast", s.beta_fast},
              {"beta_slow", s.beta_slow},
              {"truncate", s.truncate},
              {"attention_factor", s.attention_factor}};
  }
  fail<base::ContractError>("no rope scaling {}", static_cast<int>(s.kind));
}

std::int64_t read_num_experts(KeyReader& r) {
  if (!r.has("num_local_experts")) return r.integer("num_experts");
  const std::int64_t local = r.integer("num_local_experts");
  if (r.integer("num_experts", local) != local)
    r.refuse("num_experts", "contradicts num_local_experts ({})", local);
  return local;
}

// Keys that every family has.
void read_common(KeyReader& r, ModelConfig& c, double theta_fallback = 0) {
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
  r.only("attention_bias", false);
  r.only("attention_dropout", 0.0);
  r.only("is_encoder_decoder", false);
  for (const char* key : {"compression_config", "auto_map", "pruned_heads"})
    if (const json* value = r.find(key); value != nullptr && !value->empty())
      r.refuse(key, "not supported");
  const std::string dtype = r.text("dtype", r.text("torch_dtype", "bfloat16"));
  r.skip({"torch_dtype"});
  if (dtype != "bfloat16" && dtype != "float16" && dtype != "float32")
    r.refuse("dtype", "'{}' is not supported, only bfloat16, float16 and float32", dtype);
  r.skip({"architectures", "model_type", "transformers_version", "use_cache",
          "output_router_logits", "output_attentions", "output_hidden_states", "return_dict",
          "id2label", "label2id", "problem_type", "chunk_size_feed_forward"});
}

void read_router(KeyReader& r, ModelConfig& c, double aux_loss_coef) {
  c.num_experts = read_num_experts(r);
  c.router.score = ops::RouterScore::kSoftmax;
  c.router.top_k = r.small_integer("num_experts_per_tok", r.integer("num_experts_per_tok"));
  c.router_aux_loss_coef = r.number("router_aux_loss_coef", aux_loss_coef);
}

// Qwen's options for windows of attention, all off.
void refuse_windows(KeyReader& r) {
  r.only("use_sliding_window", false);
  // With use_sliding_window false these two do nothing; layer_types would bring windows back.
  r.skip({"sliding_window", "max_window_layers"});
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
  refuse_windows(r);
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
  r.absent("sliding_window");
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
  r.absent("clip_qkv");
  return c;
}

json olmoe_json(const ModelConfig& c) {
  return {{"clip_qkv", nullptr},
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
  refuse_windows(r);
  return c;
}

json qwen3_json(const ModelConfig& c) {
  return {{"head_dim", c.head_dim},
          {"intermediate_size", c.intermediate_size},
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

// One row a family: what the file calls it, how it is read and written.
struct FamilyRow {
  Family family;
  const char* architecture;
  ModelConfig (*read)(KeyReader&);
  json (*write)(const ModelConfig&);
};
constexpr FamilyRow kFamilies[] = {
    {Family::kQwen3Moe, "Qwen3MoeForCausalLM", read_qwen3_moe, qwen3_moe_json},
    {Family::kMixtral, "MixtralForCausalLM", read_mixtral, mixtral_json},
    {Family::kOlmoe, "OlmoeForCausalLM", read_olmoe, olmoe_json},
    {Family::kQwen3, "Qwen3ForCausalLM", read_qwen3, qwen3_json},
    {Family::kLlama, "LlamaForCausalLM", read_llama, llama_json},
};

const FamilyRow& family_of(KeyReader& r) {
  std::string known;
  for (const FamilyRow& row : kFamilies) known += fmt::format(" {}", row.architecture);
  const json* list = r.find("architectures");
  if (list == nullptr || !list->is_array() || list->size() != 1 || !list->at(0).is_string())
    r.refuse("architectures", "expected a list of one name; supported:{}", known);
  const std::string name = list->at(0);
  for (const FamilyRow& row : kFamilies) {
    if (name != row.architecture) continue;
    r.only("model_type", family_name(row.family));
    return row;
  }
  r.refuse("architectures", "'{}' is not supported; supported:{}", name, known);
}

json eos_json(const ModelConfig& c) {
  if (c.eos_token_ids.empty()) return nullptr;
  if (c.eos_token_ids.size() == 1) return c.eos_token_ids[0];
  return c.eos_token_ids;
}

json token_json(std::int32_t id) { return id < 0 ? json(nullptr) : json(id); }

// The shortest decimal that gives this float again: 1e-06 rather than 9.99999997e-07.
double shortest(float x) { return std::stod(fmt::format("{}", x)); }

}  // namespace

ModelConfig parse_hf_config(const json& config, const std::string& file, const json& generation,
                            const std::string& generation_file) {
  KeyReader r(config, file);
  ModelConfig c = family_of(r).read(r);
  r.skip({"quantization_config"});
  parse_fp8_format(config, file);  // how weights are stored changes no model, but must be known
  r.finish();
  if (!generation.is_null()) {
    // Only the end tokens are taken; sampling settings belong to a run, not to a model.
    KeyReader g(generation, generation_file);
    if (g.has("eos_token_id")) c.eos_token_ids = g.tokens("eos_token_id");
    for (const std::int32_t id : c.eos_token_ids)
      if (id < 0 || id >= c.vocab_size)
        g.refuse("eos_token_id", "{} is outside of the vocabulary of {} tokens", id, c.vocab_size);
  }
  validate(c, file);
  return c;
}

ModelConfig read_hf_config(const std::filesystem::path& folder) {
  const auto file = folder / "config.json", generation = folder / "generation_config.json";
  const json config = read_json_file(file);
  std::error_code error;
  const json extra =
      std::filesystem::exists(generation, error) ? read_json_file(generation) : json();
  return parse_hf_config(config, file.string(), extra, generation.string());
}

json hf_config_json(const ModelConfig& c) {
  for (const FamilyRow& row : kFamilies) {
    if (row.family != c.family) continue;
    json out = row.write(c);
    out.update(json{{"architectures", {row.architecture}},
                    {"model_type", family_name(c.family)},
                    {"torch_dtype", "bfloat16"},
                    {"attention_bias", false},
                    {"attention_dropout", 0.0},
                    {"bos_token_id", token_json(c.bos_token_id)},
                    {"eos_token_id", eos_json(c)},
                    {"pad_token_id", token_json(c.pad_token_id)},
                    {"hidden_act", "silu"},
                    {"hidden_size", c.hidden_size},
                    {"initializer_range", c.initializer_range},
                    {"max_position_embeddings", c.max_positions},
                    {"num_attention_heads", c.num_heads},
                    {"num_hidden_layers", c.num_layers},
                    {"num_key_value_heads", c.num_kv_heads},
                    {"rms_norm_eps", shortest(c.rms_eps)},
                    {"rope_scaling", rope_scaling_json(c.rope_scaling)},
                    {"rope_theta", c.rope_theta},
                    {"tie_word_embeddings", c.tie_word_embeddings},
                    {"use_cache", true},
                    {"vocab_size", c.vocab_size}});
    return out;
  }
  fail<base::ContractError>("no writer for model family {}", static_cast<int>(c.family));
}

json hf_generation_json(const ModelConfig& c) {
  json out = {{"_from_model_config", true}};
  if (c.bos_token_id >= 0) out["bos_token_id"] = c.bos_token_id;
  if (!c.eos_token_ids.empty()) out["eos_token_id"] = eos_json(c);
  if (c.pad_token_id >= 0) out["pad_token_id"] = c.pad_token_id;
  return out;
}

}  // namespace lockstep::model

#include "model/hf_config.h"

#include <cmath>
#include <limits>
#include <set>

#include "base/error.h"
#include "model/fp8_format.h"
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

 private:
  std::int64_t whole(const char* key, const json& value) const {
    if (!value.is_number_integer()) refuse(key, "expected a whole number, found {}", value.dump());
    if (value.is_number_unsigned() && value.get<std::uint64_t>() > std::uint64_t{1} << 62)
      refuse(key, "{} is too large", value.dump());
    return value.get<std::int64_t>();
  }

  const json& object_;
  std::string file_, prefix_;
  std::set<std::string, std::less<>> used_;
};

// transformers 4 writes rope_theta and rope_scaling, 5 an object rope_parameters.
double read_rope_theta(KeyReader& r) {
  r.absent("rope_scaling");
  const json* parameters = r.find("rope_parameters");
  if (parameters == nullptr) return r.number("rope_theta");
  if (!parameters->is_object()) r.refuse("rope_parameters", "expected an object");
  KeyReader rope(*parameters, r.file(), "rope_parameters.");
  rope.only("rope_type", "default");
  rope.only("type", "default");
  rope.only("partial_rotary_factor", 1.0);
  const double theta = rope.number("rope_theta");
  rope.finish();
  if (r.has("rope_theta") && r.number("rope_theta") != theta)
    r.refuse("rope_theta", "{} contradicts rope_parameters.rope_theta ({})", r.number("rope_theta"),
             theta);
  r.skip({"rope_theta"});
  return theta;
}

std::int64_t read_num_experts(KeyReader& r) {
  if (!r.has("num_local_experts")) return r.integer("num_experts");
  const std::int64_t local = r.integer("num_local_experts");
  if (r.integer("num_experts", local) != local)
    r.refuse("num_experts", "contradicts num_local_experts ({})", local);
  return local;
}

// Keys that every family has.
void read_common(KeyReader& r, ModelConfig& c) {
  c.vocab_size = r.integer("vocab_size");
  c.hidden_size = r.integer("hidden_size");
  c.num_layers = r.integer("num_hidden_layers");
  c.num_heads = r.integer("num_attention_heads");
  c.num_kv_heads = r.integer("num_key_value_heads", c.num_heads);
  c.max_positions = r.integer("max_position_embeddings");
  c.rope_theta = read_rope_theta(r);
  c.rms_eps = static_cast<float>(r.number("rms_norm_eps"));
  c.tie_word_embeddings = r.boolean("tie_word_embeddings", false);
  c.router_aux_loss_coef = r.number("router_aux_loss_coef", 0.001);
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

ModelConfig read_qwen3_moe(KeyReader& r) {
  ModelConfig c;
  c.family = Family::kQwen3Moe;
  c.qk_norm = true;
  read_common(r, c);
  c.head_dim = r.has("head_dim") ? r.integer("head_dim")
               : c.num_heads > 0 ? c.hidden_size / c.num_heads
                                 : 0;
  c.num_experts = read_num_experts(r);
  c.moe_intermediate_size = r.integer("moe_intermediate_size");
  c.router.score = ops::RouterScore::kSoftmax;
  c.router.top_k = r.small_integer("num_experts_per_tok", r.integer("num_experts_per_tok"));
  c.router.normalize = r.boolean("norm_topk_prob", false);

  r.only("decoder_sparse_step", 1);
  r.only("mlp_only_layers", json::array());
  r.only("use_sliding_window", false);
  // With use_sliding_window false these two do nothing; layer_types would bring windows back.
  r.skip({"sliding_window", "max_window_layers"});
  if (const json* types = r.find("layer_types"))
    for (const json& type : *types)
      if (type != "full_attention") r.refuse("layer_types", "{} is not supported", type.dump());
  r.skip({"intermediate_size"});  // the width of dense layers; there are none
  return c;
}

json qwen3_moe_json(const ModelConfig& c) {
  return {{"architectures", {"Qwen3MoeForCausalLM"}},
          {"decoder_sparse_step", 1},
          {"head_dim", c.head_dim},
          {"intermediate_size", c.moe_intermediate_size},
          {"mlp_only_layers", json::array()},
          {"moe_intermediate_size", c.moe_intermediate_size},
          {"norm_topk_prob", c.router.normalize},
          {"num_experts", c.num_experts},
          {"num_experts_per_tok", c.router.top_k},
          {"sliding_window", nullptr},
          {"use_sliding_window", false}};
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
    out.update(json{{"model_type", family_name(c.family)},
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
                    {"rope_theta", c.rope_theta},
                    {"router_aux_loss_coef", c.router_aux_loss_coef},
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

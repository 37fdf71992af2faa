#include "model/hf_config.h"

#include "model/fp8_format.h"
#include "model/hf_families.h"
#include "model/hf_rope.h"
#include "model/strict_json.h"

namespace lockstep::model {

using nlohmann::json;

namespace {

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
  ModelConfig c = hf_family(r).read(r);
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
  const HfFamily& family = hf_family(c.family);
  json out = family.write(c);
  out.update(json{{"architectures", {family.architecture}},
                  {"model_type", family_name(c.family)},
                  {"torch_dtype", "bfloat16"},
                  {"attention_bias", c.output_bias},
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

json hf_generation_json(const ModelConfig& c) {
  json out = {{"_from_model_config", true}};
  if (c.bos_token_id >= 0) out["bos_token_id"] = c.bos_token_id;
  if (!c.eos_token_ids.empty()) out["eos_token_id"] = eos_json(c);
  if (c.pad_token_id >= 0) out["pad_token_id"] = c.pad_token_id;
  return out;
}

}  // namespace lockstep::model

// config.json and generation_config.json, split at the first NUL.
#include <cstring>

#include "fuzz/fuzz.h"
#include "model/fp8_format.h"
#include "model/hf_config.h"
#include "model/parameters.h"
#include "model/strict_json.h"

using namespace lockstep;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view all(reinterpret_cast<const char*>(data), size);
  const std::size_t cut = std::min(all.find('\0'), size);
  try {
    const auto config = model::parse_strict_json(all.substr(0, cut), "config.json");
    nlohmann::json generation;
    if (cut < size)
      generation = model::parse_strict_json(all.substr(cut + 1), "generation_config.json");
    const model::ModelConfig c =
        model::parse_hf_config(config, "config.json", generation, "generation_config.json");
    if (c.num_layers * c.num_experts <= 4096) model::build_param_table(c);
    // What is written reads back to the same.
    const auto again = model::hf_config_json(c);
    model::parse_hf_config(model::parse_strict_json(model::json_text(again), "written"), "written",
                           model::hf_generation_json(c), "written");
  } catch (const base::InputError& e) {
    if (std::strncmp(e.what(), "written", 7) == 0) throw;
  }
  return 0;
}

std::vector<std::string> fuzz::seeds() {
  const std::string moe = R"({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
    "vocab_size": 320, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 128, "norm_topk_prob": true, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-06, "hidden_act": "silu", "eos_token_id": [1, 2],)";
  const std::string deepseek = R"({"architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3", "vocab_size": 320, "hidden_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "intermediate_size": 256,
    "moe_intermediate_size": 128, "kv_lora_rank": 128, "q_lora_rank": 128, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32, "qk_head_dim": 96, "v_head_dim": 64, "routed_scaling_factor": 2.5,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "factor": 4, "mscale": 1.0, "mscale_all_dim": 1.0}})";
  return {deepseek,
          moe + R"("rope_theta": 1000000.0})",
          moe + R"("rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head"]}})" +
              std::string(1, '\0') + R"({"eos_token_id": 3, "temperature": 0.6})",
          R"({"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "vocab_size": 320,
            "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-05, "clip_qkv": 8.0,
            "attention_bias": true, "rope_theta": 10000.0, "rope_scaling": null})",
          R"({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 320,
            "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
            "intermediate_size": 128, "max_position_embeddings": 512, "rms_norm_eps": 1e-05,
            "sliding_window": null, "rope_theta": 1e6, "router_jitter_noise": 0.0})",
          R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320,
            "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 128, "max_position_embeddings": 512, "rms_norm_eps": 1e-05,
            "attention_bias": true, "rope_theta": 500000.0, "rope_scaling": {"factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
            "original_max_position_embeddings": 128}})"};
}

std::vector<std::string> fuzz::words() {
  return {"\"num_experts\": ",
          "\"head_dim\": ",
          "\"auto_map\": {\"a\": \"b\"},",
          "\"rope_scaling\": ",
          "2147483648",
          "9223372036854775807",
          "18446744073709551615",
          "-1",
          "0",
          "1e999",
          "null",
          "true",
          "false",
          "[]",
          "{}",
          "\"\"",
          "[[[[[[[[",
          std::string(2000, '['),
          "\\ud800",
          "\xff",
          "\"quantization_config\": ",
          "1.5",
          "\"tie_word_embeddings\": true,",
          "\"num_local_experts\": 4,",
          "\"q_lora_rank\": null,",
          "\"qk_head_dim\": ",
          "\"n_shared_experts\": ",
          "\"layer_types\": [\"sliding_attention\"],",
          "\"layer_types\": 3,"};
}

// config.json of each family: what it says and what it may not say.
#include "model/families.h"
#include "model/hf_config_case.h"
#include "model/rope.h"
#include "model/small_checkpoint.h"

namespace lockstep::model {
namespace {

json llama() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"vocab_size", 100},
          {"hidden_size", 64},
          {"intermediate_size", 96},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"max_position_embeddings", 128},
          {"rms_norm_eps", 1e-5},
          {"mlp_bias", false},
          {"pretraining_tp", 1}};
}

TEST(HfConfig, reads_mixtral) {
  const ModelConfig c = parse(golden("mixtral"));
  EXPECT_EQ(c.family, Family::kMixtral);
  EXPECT_EQ(c.head_dim, 64);  // null in the file: hidden_size / heads
  EXPECT_FALSE(c.qk_norm);
  EXPECT_EQ(c.num_experts, 4);
  EXPECT_EQ(c.moe_intermediate_size, 256);
  EXPECT_EQ(c.router.top_k, 2);
  EXPECT_TRUE(c.router.normalize);
  EXPECT_FALSE(has_dense_layers(c));
}

TEST(HfConfig, reads_olmoe) {
  const ModelConfig c = parse(golden("olmoe"));
  EXPECT_EQ(c.family, Family::kOlmoe);
  EXPECT_TRUE(c.qk_norm && c.qk_norm_whole);
  EXPECT_EQ(c.num_experts, 8);
  EXPECT_EQ(c.router.top_k, 4);
  EXPECT_FALSE(c.router.normalize);
  EXPECT_EQ(c.router_aux_loss_coef, 0.01);
}

TEST(HfConfig, reads_dense_families) {
  const ModelConfig c = parse(llama());
  EXPECT_EQ(c.family, Family::kLlama);
  EXPECT_EQ(c.num_experts, 0);
  EXPECT_EQ(c.intermediate_size, 96);
  EXPECT_EQ(c.head_dim, 16);
  EXPECT_EQ(c.rope_theta, 1e4);
  EXPECT_FALSE(c.qk_norm);
  EXPECT_TRUE(is_dense(c, 0) && is_dense(c, 1));

  json qwen = llama();
  for (const char* key : {"mlp_bias", "pretraining_tp"}) qwen.erase(key);
  qwen.update(json{{"architectures", {"Qwen3ForCausalLM"}},
                   {"model_type", "qwen3"},
                   {"head_dim", 32},
                   {"rope_theta", 1e6},
                   {"use_sliding_window", false},
                   {"sliding_window", nullptr},
                   {"max_window_layers", 2}});
  const ModelConfig d = parse(qwen);
  EXPECT_EQ(d.family, Family::kQwen3);
  EXPECT_TRUE(d.qk_norm);
  EXPECT_EQ(d.head_dim, 32);
}

TEST(HfConfig, reads_dense_layers_among_experts) {
  json document = with("mlp_only_layers", {1});
  const ModelConfig c = parse(document);
  EXPECT_FALSE(is_dense(c, 0));
  EXPECT_TRUE(is_dense(c, 1));
  EXPECT_EQ(c.intermediate_size, 256);
  const ModelConfig d = parse(with("decoder_sparse_step", 2));
  EXPECT_TRUE(is_dense(d, 0));
  EXPECT_FALSE(is_dense(d, 1));
  document.erase("intermediate_size");
  expect_refused([&] { parse(document); }, {"c.json", "intermediate_size"});
}

TEST(HfConfig, reads_rope_scaling_of_both_kinds_of_file) {
  json document = llama();
  document["rope_theta"] = 5e5;
  document["rope_scaling"] = {{"rope_type", "llama3"},
                              {"factor", 8.0},
                              {"low_freq_factor", 1.0},
                              {"high_freq_factor", 4.0},
                              {"original_max_position_embeddings", 32}};
  const ModelConfig c = parse(document);
  EXPECT_EQ(c.rope_theta, 5e5);
  EXPECT_EQ(c.rope_scaling.kind, RopeScaling::kLlama3);
  EXPECT_EQ(c.rope_scaling.factor, 8);
  EXPECT_EQ(c.rope_scaling.original_positions, 32);

  json yarn = {{"type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 32}};
  document["rope_scaling"] = yarn;
  EXPECT_EQ(parse(document).rope_scaling.attention_factor, yarn_attention_factor(4));
  document.erase("rope_scaling");
  document.erase("rope_theta");
  yarn.update(json{{"rope_theta", 1e6}, {"mscale", 1.0}, {"mscale_all_dim", 0.5}});
  document["rope_parameters"] = yarn;
  const ModelConfig d = parse(document);
  EXPECT_EQ(d.rope_theta, 1e6);
  EXPECT_EQ(d.rope_scaling.kind, RopeScaling::kYarn);
  EXPECT_EQ(d.rope_scaling.attention_factor,
            yarn_attention_factor(4, 1.0) / yarn_attention_factor(4, 0.5));
  document["rope_parameters"]["attention_factor"] = 1.5;
  EXPECT_EQ(parse(document).rope_scaling.attention_factor, 1.5);
  document["rope_scaling"] = yarn;
  expect_refused([&] { parse(document); }, {"c.json", "rope_scaling"});
}

TEST(HfConfig, every_family_survives_writing_and_reading) {
  for (const FamilyCase& f : family_cases(small_config())) {
    SCOPED_TRACE(f.name);
    const json written = hf_config_json(f.config);
    const ModelConfig c = parse(parse_strict_json(json_text(written), "c"));
    EXPECT_EQ(hf_config_json(c), written);
    EXPECT_EQ(c.family, f.config.family);
    EXPECT_EQ(c.qk_norm, f.config.qk_norm);
    EXPECT_EQ(c.qk_norm_whole, f.config.qk_norm_whole);
    EXPECT_EQ(c.router.normalize, f.config.router.normalize);
    EXPECT_EQ(c.num_experts, f.config.num_experts);
    EXPECT_EQ(rope_frequencies(c).inverse, rope_frequencies(f.config).inverse);
    EXPECT_EQ(rope_frequencies(c).factor, rope_frequencies(f.config).factor);
    for (std::int64_t l = 0; l < c.num_layers; ++l)
      EXPECT_EQ(is_dense(c, l), is_dense(f.config, l));
  }
}

// The config.json that DeepSeek-V3 was published with.
json deepseek_v3() {
  return json::parse(R"({"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false,
    "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
    "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3",
    "quant_method": "fp8", "weight_block_size": [128, 128]}, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": true,
    "v_head_dim": 128, "vocab_size": 129280})");
}

TEST(HfConfig, reads_deepseek_v3) {
  const ModelConfig c = parse(deepseek_v3());
  EXPECT_EQ(c.family, Family::kDeepseekV3);
  EXPECT_EQ(c.latent.kv_rank, 512);
  EXPECT_EQ(c.latent.q_rank, 1536);
  EXPECT_EQ(c.latent.nope, 128);
  EXPECT_EQ(c.latent.value, 128);
  EXPECT_TRUE(c.latent.interleaved);
  EXPECT_EQ(c.head_dim, 64);
  EXPECT_EQ(c.num_experts, 256);
  EXPECT_EQ(c.num_shared_experts, 1);
  EXPECT_EQ(c.router.score, ops::RouterScore::kSigmoid);
  EXPECT_EQ(c.router.top_k, 8);
  EXPECT_EQ(c.router.groups, 8);
  EXPECT_EQ(c.router.top_groups, 4);
  EXPECT_EQ(c.router.scaling, 2.5f);
  EXPECT_TRUE(c.router.normalize);
  for (std::int64_t l = 0; l < 61; ++l) EXPECT_EQ(is_dense(c, l), l < 3);
  EXPECT_EQ(c.rope_scaling.attention_factor, 1.0);
  const double m = 0.1 * std::log(40.0) + 1;
  EXPECT_DOUBLE_EQ(attention_scale(c), m * m / std::sqrt(192.0));
  const ModelConfig again = parse(hf_config_json(c));
  EXPECT_EQ(hf_config_json(again), hf_config_json(c));
  EXPECT_EQ(attention_scale(again), attention_scale(c));
}

TEST(HfConfig, reads_relatives_of_deepseek_v3) {
  json moonlight = deepseek_v3();
  moonlight.update(json{{"q_lora_rank", nullptr},
                        {"n_group", 1},
                        {"topk_group", 1},
                        {"n_shared_experts", 2},
                        {"n_routed_experts", 64},
                        {"num_experts_per_tok", 6},
                        {"rope_scaling", nullptr},
                        {"seq_aux", true},
                        {"aux_loss_alpha", 0.01},
                        {"num_nextn_predict_layers", 0}});
  const ModelConfig c = parse(moonlight);
  EXPECT_EQ(c.latent.q_rank, 0);
  EXPECT_EQ(c.num_shared_experts, 2);
  EXPECT_EQ(c.router_aux_loss_coef, 0.01);
  EXPECT_DOUBLE_EQ(attention_scale(c), 1 / std::sqrt(192.0));
  json kimi = deepseek_v3();
  kimi["model_type"] = "kimi_k2";
  EXPECT_EQ(parse(kimi).family, Family::kDeepseekV3);
  EXPECT_EQ(hf_config_json(parse(kimi))["model_type"], "deepseek_v3");
  EXPECT_FALSE(parse(golden("deepseek_v3_halves")).latent.interleaved);
}

TEST(HfConfig, options_of_a_family_that_are_not_supported_are_refused_by_name) {
  const auto refused = [](json document, const char* key, const json& value) {
    document[key] = value;
    SCOPED_TRACE(std::string(key) + " = " + value.dump());
    expect_refused([&] { parse(document); }, {"c.json", key});
  };
  refused(golden("mixtral"), "sliding_window", 64);
  refused(golden("mixtral"), "router_jitter_noise", 0.1);
  refused(golden("mixtral"), "norm_topk_prob", true);
  refused(golden("mixtral"), "attention_bias", true);
  refused(golden("mixtral"), "mlp_only_layers", {0});
  refused(golden("olmoe"), "clip_qkv", 0.0);
  refused(golden("olmoe"), "clip_qkv", -8.0);
  refused(golden("olmoe"), "clip_qkv", 1e39);
  refused(golden("olmoe"), "clip_qkv", "8");
  refused(golden("mixtral"), "clip_qkv", 8.0);
  refused(golden("olmoe"), "head_dim", 32);
  for (const auto& [key, value] : std::vector<std::pair<const char*, json>>{
           {"attention_bias", true},
           {"auto_map", {{"AutoModel", "modeling_other.Model"}}},
           {"scoring_func", "softmax"},
           {"topk_method", "group_limited_greedy"},
           {"moe_layer_freq", 2},
           {"model_type", "deepseek_v2"},
           {"kv_lora_rank", 0},
           {"q_lora_rank", -1},
           {"head_dim", 128},
           {"qk_head_dim", 128},
           {"num_key_value_heads", 8},
           {"qk_rope_head_dim", 63},
           {"n_group", 7},
           {"n_group", nullptr},
           {"topk_group", 9},
           {"num_experts_per_tok", 129},
           {"n_shared_experts", -1},
           {"first_k_dense_replace", -1},
           {"v_head_dim", 0},
           {"kv_lora_rank", std::int64_t{1} << 31}})
    refused(deepseek_v3(), key, value);
  refused(llama(), "mlp_bias", true);
  refused(llama(), "sliding_window", 128);
  refused(llama(), "num_experts", 8);
  refused(llama(), "intermediate_size", 0);
  refused(llama(), "rope_interleaved", true);
}

}  // namespace
}  // namespace lockstep::model

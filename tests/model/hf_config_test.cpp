#include "model/hf_config_case.h"

namespace lockstep::model {
namespace {

TEST(HfConfig, reads_what_transformers_5_wrote) {
  const ModelConfig c = parse(good());
  EXPECT_EQ(c.family, Family::kQwen3Moe);
  EXPECT_EQ(c.vocab_size, 320);
  EXPECT_EQ(c.hidden_size, 256);
  EXPECT_EQ(c.num_layers, 2);
  EXPECT_EQ(c.num_heads, 4);
  EXPECT_EQ(c.num_kv_heads, 2);
  EXPECT_EQ(c.head_dim, 64);
  EXPECT_EQ(c.max_positions, 512);
  EXPECT_EQ(c.rope_theta, 1e6);
  EXPECT_EQ(c.rms_eps, 1e-6f);
  EXPECT_TRUE(c.qk_norm);
  EXPECT_FALSE(c.tie_word_embeddings);
  EXPECT_EQ(c.num_experts, 8);
  EXPECT_EQ(c.moe_intermediate_size, 128);
  EXPECT_EQ(c.router.top_k, 2);
  EXPECT_EQ(c.router.score, ops::RouterScore::kSoftmax);
  EXPECT_TRUE(c.router.normalize);
  EXPECT_EQ(c.router_aux_loss_coef, 0.001);
  EXPECT_EQ(c.initializer_range, 0.02);
  EXPECT_EQ(c.bos_token_id, 1);
  EXPECT_EQ(c.eos_token_ids, std::vector<std::int32_t>{2});
  EXPECT_EQ(c.pad_token_id, 0);
}

TEST(HfConfig, reads_the_keys_of_transformers_4) {
  json old = good();
  for (const char* key : {"rope_parameters", "num_local_experts", "dtype", "pad_token_id"})
    old.erase(key);
  old.update(json{{"rope_theta", 5e5},
                  {"rope_scaling", nullptr},
                  {"num_experts", 8},
                  {"torch_dtype", "float32"},
                  {"eos_token_id", {2, 3}},
                  {"max_window_layers", 2},
                  {"_name_or_path", "somewhere"}});
  const ModelConfig c = parse(old);
  EXPECT_EQ(c.rope_theta, 5e5);
  EXPECT_EQ(c.num_experts, 8);
  EXPECT_EQ(c.eos_token_ids, (std::vector<std::int32_t>{2, 3}));
  EXPECT_EQ(c.pad_token_id, -1);
}

TEST(HfConfig, generation_config_gives_the_end_tokens) {
  const auto c = parse_hf_config(good(), "c.json", {{"eos_token_id", {5, 6}}, {"top_k", 20}}, "g");
  EXPECT_EQ(c.eos_token_ids, (std::vector<std::int32_t>{5, 6}));
  EXPECT_EQ(parse_hf_config(good(), "c.json", {{"top_k", 20}}, "g").eos_token_ids,
            std::vector<std::int32_t>{2});
  for (const json& bad : {json(320), json(-1), json("x"), json({2, 320})})
    expect_refused(
        [&] {
          parse_hf_config(good(), "c.json", {{"eos_token_id", bad}}, "gen.json");
        },
        {"gen.json", "eos_token_id"});
}

TEST(HfConfig, survives_writing_and_reading) {
  ModelConfig c = parse(good());
  c.tie_word_embeddings = true;
  c.eos_token_ids = {2, 7};
  c.pad_token_id = -1;
  c.rope_theta = 12345.678;
  c.rms_eps = 1e-5f;
  c.router.normalize = false;
  const ModelConfig d =
      parse_hf_config(parse_strict_json(json_text(hf_config_json(c)), "c"), "c",
                      parse_strict_json(json_text(hf_generation_json(c)), "g"), "g");
  EXPECT_EQ(hf_config_json(d), hf_config_json(c));
  EXPECT_EQ(d.eos_token_ids, c.eos_token_ids);
  EXPECT_EQ(d.rope_theta, c.rope_theta);
  EXPECT_EQ(d.rms_eps, c.rms_eps);
  EXPECT_EQ(d.pad_token_id, -1);
  EXPECT_FALSE(d.router.normalize);
  EXPECT_TRUE(d.tie_word_embeddings);
}

TEST(HfConfig, options_that_are_not_supported_are_refused_by_name) {
  const std::vector<std::pair<const char*, json>> rows = {
      {"architectures", {"DeepseekV2ForCausalLM"}},
      {"architectures", "Qwen3MoeForCausalLM"},
      {"architectures", json::array()},
      {"architectures", nullptr},
      {"model_type", "qwen2_moe"},
      {"attention_bias", 1},
      {"attention_dropout", 0.1},
      {"hidden_act", "gelu"},
      {"layer_types", {"full_attention", "sliding_attention"}},
      {"rope_scaling", {{"type", "yarn"}}},
      {"rope_parameters", {{"rope_type", "yarn"}, {"rope_theta", 1e6}}},
      {"rope_parameters", {{"rope_type", "dynamic"}, {"rope_theta", 1e6}, {"factor", 2}}},
      {"rope_parameters", {{"rope_type", "longrope"}, {"rope_theta", 1e6}, {"factor", 2}}},
      {"rope_parameters", {{"rope_type", "linear"}, {"rope_theta", 1e6}, {"factor", 0}}},
      {"rope_parameters", {{"rope_type", "linear"}, {"rope_theta", 1e6}, {"factor", -2}}},
      {"rope_parameters",
       {{"rope_type", "linear"}, {"rope_theta", 1e6}, {"factor", 2}, {"surprise", 1}}},
      {"rope_parameters", {{"rope_type", "llama3"}, {"rope_theta", 1e6}, {"factor", 2}}},
      {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 1e6}, {"factor", 2}}},
      {"rope_parameters", {{"rope_type", "default"}}},
      {"rope_parameters", 7},
      {"rope_theta", 1e4},
      {"mlp_only_layers", {2}},
      {"mlp_only_layers", {-1}},
      {"mlp_only_layers", {0, 0}},
      {"mlp_only_layers", {0.5}},
      {"mlp_only_layers", 1},
      {"decoder_sparse_step", 0},
      {"decoder_sparse_step", -1},
      {"quantization_config", {{"quant_method", "fp8"}}},
      {"auto_map", {{"AutoModel", "x.Y"}}},
      {"dtype", "float8_e4m3fn"},
      {"num_experts", 16},
      {"surprise", 1},
  };
  for (const auto& [key, value] : rows) expect_key_refused(key, value);
}

TEST(HfConfig, windows_wider_than_the_model_change_nothing) {
  json mixtral = golden("mixtral");
  for (const json& window : {json(nullptr), json(512), json(4096)}) {
    mixtral["sliding_window"] = window;
    EXPECT_EQ(hf_config_json(parse(mixtral))["sliding_window"], nullptr);
  }
  mixtral["sliding_window"] = 511;
  expect_refused([&] { parse(mixtral); }, {"c.json", "sliding_window", "511", "512"});
  json qwen = with("sliding_window", 128);
  EXPECT_EQ(parse(qwen).max_positions, 512);
  qwen["use_sliding_window"] = true;
  expect_refused([&] { parse(qwen); }, {"c.json", "sliding_window", "128"});
  qwen["sliding_window"] = 512;
  EXPECT_EQ(parse(qwen).max_positions, 512);
  qwen["sliding_window"] = nullptr;
  EXPECT_EQ(parse(qwen).max_positions, 512);
}

// As the models' publishers wrote them, with every key.
TEST(HfConfig, published_files_load) {
  const auto read = [](const char* text) { return parse(parse_strict_json(text, "c.json")); };
  const ModelConfig qwen3 = read(R"({"architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
    "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": true,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false,
    "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings": false,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
    "use_sliding_window": false, "vocab_size": 151936})");
  EXPECT_EQ(qwen3.num_experts, 128);
  EXPECT_EQ(qwen3.head_dim * qwen3.num_heads, 4096);
  EXPECT_TRUE(qwen3.qk_norm && !qwen3.qkv_bias && !has_dense_layers(qwen3));

  const ModelConfig mixtral = read(R"({"architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "output_router_logits": false, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": null,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0", "use_cache": true, "vocab_size": 32000})");
  EXPECT_EQ(mixtral.head_dim, 128);
  EXPECT_EQ(mixtral.moe_intermediate_size, 14336);

  const ModelConfig olmoe = read(R"({"architectures": ["OlmoeForCausalLM"],
    "attention_bias": false, "attention_dropout": 0.0, "clip_qkv": null, "eos_token_id": 50279,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe",
    "norm_topk_prob": false, "num_attention_heads": 16, "num_experts": 64,
    "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
    "output_router_logits": false, "pad_token_id": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
    "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": false,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": true,
    "vocab_size": 50304})");
  EXPECT_TRUE(olmoe.qk_norm_whole);
  EXPECT_EQ(olmoe.clip_qkv, 0);
  EXPECT_EQ(olmoe.bos_token_id, -1);

  const ModelConfig llama = read(R"({"architectures": ["LlamaForCausalLM"],
    "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
    "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0,
    "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": true,
    "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "use_cache": true,
    "vocab_size": 128256})");
  EXPECT_EQ(llama.eos_token_ids.size(), 3u);
  EXPECT_EQ(llama.rope_scaling.factor, 32);

  const ModelConfig smollm = read(R"({"architectures": ["LlamaForCausalLM"],
    "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": true, "max_position_embeddings": 8192,
    "mlp_bias": false, "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000,
    "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 49152})");
  EXPECT_EQ(smollm.head_dim, 64);
  EXPECT_EQ(smollm.rope_theta, 1e5);

  const ModelConfig qwen2 = read(R"({"architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
    "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": true, "use_mrope": false,
    "use_sliding_window": false, "vocab_size": 151936})");
  EXPECT_TRUE(qwen2.qkv_bias && !qwen2.output_bias && !qwen2.qk_norm);
  EXPECT_EQ(qwen2.head_dim, 64);
}

TEST(HfConfig, keys_that_change_nothing_are_passed_over) {
  const std::vector<std::pair<const char*, json>> rows = {
      {"max_length", 20},
      {"do_sample", true},
      {"temperature", 0.7},
      {"top_k", 50},
      {"tokenizer_class", "LlamaTokenizer"},
      {"unsloth_version", "2025.1"},
      {"add_cross_attention", false},
      {"_name_or_path", "x"},
      {"layer_types", {"full_attention", "full_attention"}},
      {"pad_token_id", nullptr},
      {"tie_word_embeddings", nullptr},
  };
  for (const auto& [key, value] : rows) EXPECT_EQ(parse(with(key, value)).hidden_size, 256) << key;
  expect_key_refused("add_cross_attention", true);
}

TEST(HfConfig, values_that_cannot_be_are_refused_by_name) {
  for (const char* key : {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                          "num_key_value_heads", "head_dim", "max_position_embeddings",
                          "moe_intermediate_size", "num_experts_per_tok"})
    for (const json& value : {json(0), json(-1), json(std::int64_t{1} << 31),
                              json(std::uint64_t{1} << 63), json(1.5), json("8"), json(true)})
      expect_key_refused(key, value);
  for (const json& value : {json(0), json(-8), json(std::int64_t{1} << 31)}) {
    json document = good();
    document["num_local_experts"] = value;
    expect_refused([&] { parse(document); }, {"c.json", "num_experts"});
  }
  expect_key_refused("num_experts_per_tok", 9);
  expect_key_refused("num_key_value_heads", 3);
  expect_key_refused("head_dim", 63);
  expect_key_refused("rms_norm_eps", 0);
  expect_key_refused("rms_norm_eps", -1e-6);
  expect_key_refused("rms_norm_eps", 1e300);
  expect_key_refused("bos_token_id", 320);
  expect_key_refused("eos_token_id", {2, -1});
  expect_key_refused("norm_topk_prob", 1);
  expect_key_refused("num_hidden_layers", 2147483647);  // each size fits, the model does not
  expect_key_refused("max_position_embeddings", 2147483647);
  json huge = with("vocab_size", 2147483647);
  huge["hidden_size"] = 2147483647;
  expect_refused([&] { parse(huge); }, {"c.json", "parameters"});
  for (const char* key : {"vocab_size", "rms_norm_eps", "num_experts_per_tok", "hidden_size"}) {
    json document = good();
    document.erase(key);
    expect_refused([&] { parse(document); }, {"c.json", key, "missing"});
  }
}

TEST(StrictJson, refuses_what_is_not_one_plain_object) {
  const auto refused = [](const std::string& text, const std::string& part) {
    SCOPED_TRACE(text.substr(0, 60));
    expect_refused([&] { parse_strict_json(text, "f.json"); }, {"f.json", part});
  };
  refused("", "not valid JSON");
  refused("{", "not valid JSON");
  refused("{} x", "not valid JSON");
  refused("[1]", "object");
  refused("null", "object");
  refused(R"({"a": NaN})", "not valid JSON");
  refused(R"({"a": 1e999})", "not valid JSON");
  refused("{\"a\": \"\xFF\"}", "not valid JSON");
  refused(R"({"a": 1, "a": 1})", "'a' twice");
  refused(R"({"b": {"a": 1, "c": [{"a": 1}], "a": 2}})", "'a' twice");
  const std::string many(1000000, '[');
  refused("{\"a\": " + many, "nested deeper");
  std::string objects = "{";
  for (int i = 0; i < 1000000; ++i) objects += "\"a\":{";
  refused(objects, "nested deeper");
  EXPECT_EQ(parse_strict_json(R"({"b": {"a": 1}, "a": 2})", "f").size(), 2u);
}

struct HfConfigFile : TempFolderTest {};

TEST_F(HfConfigFile, missing_and_oversized_files_are_refused) {
  expect_refused([&] { read_hf_config(folder); }, {(folder / "config.json").string()});
  put_file(folder / "config.json", std::string(2 << 20, ' ') + "{}");
  expect_refused([&] { read_hf_config(folder); }, {(folder / "config.json").string()});
  put_file(folder / "config.json", good().dump());
  put_file(folder / "generation_config.json", "{");
  expect_refused([&] { read_hf_config(folder); }, {"generation_config.json"});
}

}  // namespace
}  // namespace lockstep::model
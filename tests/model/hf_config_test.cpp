#include "model/hf_config.h"

#include "model/families.h"
#include "model/rope.h"
#include "model/small_checkpoint.h"
#include "model/strict_json.h"
#include "model/temp_folder.h"

namespace lockstep::model {
namespace {

using nlohmann::json;

json good() {
  return read_json_file(std::filesystem::path(LOCKSTEP_TEST_DATA) / "hf/qwen3_moe/config.json");
}

ModelConfig parse(const json& document) { return parse_hf_config(document, "c.json", {}, ""); }

json with(const char* key, const json& value) {
  json document = good();
  document[key] = value;
  return document;
}

void expect_key_refused(const char* key, const json& value) {
  SCOPED_TRACE(std::string(key) + " = " + value.dump());
  expect_refused([&] { parse(with(key, value)); }, {"c.json", key});
}

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
      {"architectures", {"DeepseekV3ForCausalLM"}},
      {"architectures", "Qwen3MoeForCausalLM"},
      {"architectures", json::array()},
      {"architectures", nullptr},
      {"model_type", "qwen2_moe"},
      {"attention_bias", 1},
      {"attention_dropout", 0.1},
      {"hidden_act", "gelu"},
      {"use_sliding_window", true},
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

json golden(const char* family) {
  return read_json_file(std::filesystem::path(LOCKSTEP_TEST_DATA) / "hf" / family / "config.json");
}

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

TEST(HfConfig, options_of_a_family_that_are_not_supported_are_refused_by_name) {
  const auto refused = [](json document, const char* key, const json& value) {
    document[key] = value;
    SCOPED_TRACE(std::string(key) + " = " + value.dump());
    expect_refused([&] { parse(document); }, {"c.json", key});
  };
  refused(golden("mixtral"), "sliding_window", 4096);
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
  refused(llama(), "mlp_bias", true);
  refused(llama(), "sliding_window", 128);
  refused(llama(), "num_experts", 8);
  refused(llama(), "intermediate_size", 0);
  refused(llama(), "rope_interleaved", true);
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

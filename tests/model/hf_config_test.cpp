#include "model/hf_config.h"

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
      {"architectures", {"LlamaForCausalLM"}},
      {"architectures", "Qwen3MoeForCausalLM"},
      {"architectures", json::array()},
      {"architectures", nullptr},
      {"model_type", "qwen2_moe"},
      {"attention_bias", true},
      {"attention_dropout", 0.1},
      {"hidden_act", "gelu"},
      {"use_sliding_window", true},
      {"layer_types", {"full_attention", "sliding_attention"}},
      {"rope_scaling", {{"type", "yarn"}}},
      {"rope_parameters", {{"rope_type", "yarn"}, {"rope_theta", 1e6}}},
      {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 1e6}, {"factor", 2}}},
      {"rope_parameters", {{"rope_type", "default"}}},
      {"rope_parameters", 7},
      {"rope_theta", 1e4},
      {"mlp_only_layers", {0}},
      {"decoder_sparse_step", 2},
      {"quantization_config", {{"quant_method", "fp8"}}},
      {"auto_map", {{"AutoModel", "x.Y"}}},
      {"dtype", "float8_e4m3fn"},
      {"num_experts", 16},
      {"surprise", 1},
  };
  for (const auto& [key, value] : rows) expect_key_refused(key, value);
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

#include "model/convert.h"

#include <nlohmann/json.hpp>

#include "model/fp8_import.h"
#include "model/gguf_writer.h"
#include "model/small_checkpoint.h"
#include "model/strict_json.h"

namespace lockstep::model {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

struct Convert : TempFolderTest {
  tensor::Arena workspace;
  tensor::Context ctx = tensor::cpu_context(workspace, 1);
  Weights weights;
  fs::path bf16 = folder / "bf16";

  void SetUp() override {
    TempFolderTest::SetUp();
    ModelConfig c = small_config();
    c.hidden_size = 144;
    c.moe_intermediate_size = 136;
    weights = make_weights(c);
    initialize(weights, 5);
    const Tokenizer tokenizer = byte_tokenizer();
    save_checkpoint(weights, &tokenizer, bf16);
  }
  fs::path run(const fs::path& from, const std::string& to, ConvertOptions options = {}) {
    convert(open_hf_source(from), folder / to, options);
    return folder / to;
  }
  static void expect_same_folder(const fs::path& a, const fs::path& b) {
    std::size_t files = 0;
    for (const auto& entry : fs::directory_iterator(a)) {
      ++files;
      EXPECT_EQ(file_bytes(entry.path()), file_bytes(b / entry.path().filename()))
          << entry.path().filename();
    }
    EXPECT_EQ(files, static_cast<std::size_t>(std::distance(fs::directory_iterator(b), {})));
  }
};

TEST_F(Convert, a_bf16_folder_comes_back_byte_for_byte) {
  expect_same_folder(bf16, run(bf16, "copy"));
  const fs::path hf = fs::path(LOCKSTEP_TEST_DATA) / "hf/qwen3_moe";
  const fs::path out = run(hf, "hf");
  for (const char* name : {"config.json", "generation_config.json", "model.safetensors"})
    EXPECT_EQ(file_bytes(out / name), file_bytes(hf / name)) << name;
}

TEST_F(Convert, biases_stay_bf16_beside_fp8_projections) {
  const fs::path hf = fs::path(LOCKSTEP_TEST_DATA) / "hf/llama";
  ConvertOptions options;
  options.to = StoreAs::kFp8;
  convert(open_hf_source(hf), folder / "fp8", options);
  options.to = StoreAs::kBf16;
  convert(open_hf_source(folder / "fp8"), folder / "bf16", options);
  const SafetensorsFile from = open_safetensors(hf / "model.safetensors"),
                        fp8 = open_safetensors(folder / "fp8/model.safetensors"),
                        back = open_safetensors(folder / "bf16/model.safetensors");
  int biases = 0;
  for (const auto& [name, t] : from.tensors) {
    if (!name.ends_with(".bias")) continue;
    ++biases;
    for (const SafetensorsFile* file : {&fp8, &back}) {
      const FileTensor& other = file->at(name);
      EXPECT_EQ(other.dtype, FileDtype::kBF16);
      EXPECT_EQ(other.shape, t.shape);
      EXPECT_TRUE(std::equal(t.bytes.begin(), t.bytes.end(), other.bytes.begin())) << name;
    }
  }
  EXPECT_EQ(biases, 8);
  EXPECT_EQ(fp8.at("model.layers.0.self_attn.o_proj.weight").dtype, FileDtype::kF8E4M3);
  load_checkpoint(folder / "fp8");
}

TEST_F(Convert, fp8_as_the_engine_would_save_it) {
  const fs::path out = run(bf16, "fp8", {StoreAs::kFp8});
  Precision precision;
  precision.fp8 = true;
  SaveOptions options;
  options.fp8 = quantized_for(ctx, weights, precision).get();
  save_checkpoint(weights, nullptr, folder / "saved", options);
  EXPECT_EQ(file_bytes(out / "model.safetensors"), file_bytes(folder / "saved/model.safetensors"));
  EXPECT_EQ(read_json_file(out / "config.json")["quantization_config"],
            read_json_file(folder / "saved/config.json")["quantization_config"]);
  // FP8 to FP8: nothing changes, asked for or not.
  expect_same_folder(out, run(out, "again"));
  expect_same_folder(out, run(out, "again", {StoreAs::kFp8}));
  // FP8 to BF16: the dequantized values that the engine reads.
  const fs::path back = run(out, "back", {StoreAs::kBf16});
  EXPECT_FALSE(read_json_file(back / "config.json").contains("quantization_config"));
  EXPECT_TRUE(same_bytes(load_checkpoint(back), load_checkpoint(out)));
  EXPECT_FALSE(has_fp8(open_checkpoint(back)));
}

TEST_F(Convert, layers_that_the_source_keeps_in_bf16_stay) {
  Precision precision;
  precision.fp8 = true;
  precision.num_last_layers_in_bf16 = 1;
  SaveOptions options;
  options.fp8 = quantized_for(ctx, weights, precision).get();
  save_checkpoint(weights, nullptr, folder / "some", options);
  EXPECT_EQ(file_bytes(run(folder / "some", "a") / "model.safetensors"),
            file_bytes(folder / "some/model.safetensors"));
  EXPECT_EQ(file_bytes(run(folder / "some", "b", {StoreAs::kFp8}) / "model.safetensors"),
            file_bytes(folder / "some/model.safetensors"));
}

TEST_F(Convert, experts_in_bf16_are_one_name) {
  const std::vector<std::string> fp8 = {"a.experts.0.up_proj.weight", "o_proj.weight"};
  EXPECT_EQ(modules_in_bf16({"a.experts.0.down_proj.weight", "b.experts.0.up_proj.weight",
                             "b.experts.1.up_proj.weight", "lm_head.weight"},
                            fp8),
            (std::vector<std::string>{"a.experts.0.down_proj", "b.experts", "lm_head"}));
  EXPECT_TRUE(names_module({"b.experts"}, "b.experts.1.up_proj.weight"));
  EXPECT_TRUE(names_module({"lm_head"}, "lm_head.weight"));
  EXPECT_TRUE(names_module({"gate"}, "model.layers.0.mlp.gate.weight"));
  EXPECT_FALSE(names_module({"gate", "b.expert", ""}, "b.experts.1.gate_proj.weight"));
}

TEST_F(Convert, scales_that_are_powers_of_two) {
  ConvertOptions options{StoreAs::kFp8, true};
  const fs::path out = run(bf16, "pow2", options);
  EXPECT_EQ(read_json_file(out / "config.json")["quantization_config"]["scale_fmt"], "ue8m0");
  Precision precision;
  precision.fp8 = precision.weight_pow2 = true;
  SaveOptions save;
  save.fp8 = quantized_for(ctx, weights, precision).get();
  save_checkpoint(weights, nullptr, folder / "saved", save);
  EXPECT_EQ(file_bytes(out / "model.safetensors"), file_bytes(folder / "saved/model.safetensors"));
  const fs::path plain = run(bf16, "fp8", {StoreAs::kFp8});
  expect_refused([&] { run(plain, "no", options); }, {"ue8m0"});
}

TEST_F(Convert, shards_and_back) {
  ConvertOptions options;
  options.max_shard_bytes = 50'000;
  std::uint64_t last = 0, total = 1;
  options.progress = [&](std::uint64_t done, std::uint64_t all) {
    EXPECT_GT(done, last);
    last = done, total = all;
  };
  const fs::path shards = run(bf16, "shards", options);
  EXPECT_EQ(last, total);
  EXPECT_FALSE(fs::exists(shards / "model.safetensors"));
  EXPECT_TRUE(same_bytes(load_checkpoint(shards), weights));
  expect_same_folder(bf16, run(shards, "whole"));
  run(shards, "shards", {});  // onto the folder that it reads from
  expect_same_folder(bf16, shards);
}

struct UpcycleTest : TempFolderTest {
  fs::path file = folder / "m.gguf";
  void SetUp() override {
    TempFolderTest::SetUp();
    put_file(file, SmallGguf().w.bytes());
  }
  SafetensorsFile convert_with(const std::string& name, const Upcycle* options) {
    ModelSource source = open_gguf_source(file);
    if (options != nullptr) upcycle(source, *options);
    convert(source, folder / name, {});
    return open_safetensors(folder / name / "model.safetensors");
  }
};

TEST_F(UpcycleTest, every_expert_is_the_dense_mlp) {
  const Upcycle options{4, 2, 0};
  const SafetensorsFile dense = convert_with("dense", nullptr), moe = convert_with("moe", &options);
  const json config = read_json_file(folder / "moe/config.json");
  EXPECT_EQ(config["architectures"], json{"MixtralForCausalLM"});
  EXPECT_EQ(config["model_type"], "mixtral");
  EXPECT_EQ(config["num_local_experts"], 4);
  EXPECT_EQ(config["num_experts_per_tok"], 2);
  EXPECT_EQ(config["intermediate_size"], 160);
  EXPECT_FALSE(config.contains("mlp_bias"));
  const auto same = [](const FileTensor& a, const FileTensor& b) {
    return a.shape == b.shape && a.bytes.size() == b.bytes.size() &&
           std::memcmp(a.bytes.data(), b.bytes.data(), a.bytes.size()) == 0;
  };
  std::size_t seen = 0;
  for (const auto& [name, t] : dense.tensors) {
    const std::size_t at = name.find(".mlp.");
    if (at == std::string::npos) {
      EXPECT_TRUE(same(t, moe.at(name))) << name;
      ++seen;
      continue;
    }
    const char* which = name.ends_with("gate_proj.weight") ? "w1"
                        : name.ends_with("up_proj.weight") ? "w3"
                                                           : "w2";
    for (int e = 0; e < 4; ++e, ++seen)
      EXPECT_TRUE(same(t, moe.at(fmt::format("{}.block_sparse_moe.experts.{}.{}.weight",
                                             name.substr(0, at), e, which))));
  }
  EXPECT_EQ(moe.tensors.size(), seen + 2);
  // Routers: small, different from layer to layer, the same for the same seed.
  const FileTensor& a = moe.at("model.layers.0.block_sparse_moe.gate.weight");
  EXPECT_EQ(a.shape, (std::vector<std::int64_t>{4, 96}));
  EXPECT_FALSE(same(a, moe.at("model.layers.1.block_sparse_moe.gate.weight")));
  double square = 0;
  for (std::size_t i = 0; i < 384; ++i) {
    numerics::Bf16 x;
    std::memcpy(&x, a.bytes.data() + 2 * i, 2);
    square += numerics::to_float(x) * numerics::to_float(x);
  }
  EXPECT_NEAR(square / 384, 4e-4, 1e-4);
  const Upcycle other{4, 2, 1};
  EXPECT_FALSE(
      same(a, convert_with("other", &other).at("model.layers.0.block_sparse_moe.gate.weight")));
  EXPECT_TRUE(
      same(a, convert_with("again", &options).at("model.layers.0.block_sparse_moe.gate.weight")));
}

TEST_F(UpcycleTest, options_and_sources_are_checked) {
  const Upcycle parsed = parse_upcycle("experts=8,top_k=3,seed=9", "--upcycle");
  EXPECT_EQ(parsed.experts, 8);
  EXPECT_EQ(parsed.top_k, 3);
  EXPECT_EQ(parsed.seed, 9u);
  for (const char* bad : {"", "experts", "experts=", "experts=8,", "experts=0", "top_k=9",
                          "experts=2147483648", "expert=8", "experts=8 top_k=2", "top_k=-1"})
    expect_refused([&] { parse_upcycle(bad, "--upcycle"); }, {"--upcycle"});
  put_file(file, SmallGguf("qwen3moe", 4).w.bytes());
  expect_refused(
      [&] {
        const Upcycle o;
        convert_with("x", &o);
      },
      {"Qwen3MoeForCausalLM"});
}

}  // namespace
}  // namespace lockstep::model

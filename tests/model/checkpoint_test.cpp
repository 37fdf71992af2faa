#include "model/checkpoint.h"

#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

#include "model/convert.h"
#include "model/families.h"
#include "model/hf_config.h"
#include "model/hf_golden.h"
#include "model/safetensors.h"
#include "model/small_checkpoint.h"
#include "model/strict_json.h"

namespace lockstep::model {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using numerics::Bf16;

struct CheckpointTest : TempFolderTest {
  fs::path place = folder / "model";
  fs::path file = place / "model.safetensors";
  Weights weights = small_weights();

  void SetUp() override {
    TempFolderTest::SetUp();
    save_checkpoint(weights, nullptr, place);
  }
  void expect_load_refused(std::initializer_list<std::string> parts) {
    expect_refused([&] { load_checkpoint(place); }, parts);
  }
};

TEST_F(CheckpointTest, survives_saving_and_loading) {
  const Weights loaded = load_checkpoint(place);
  EXPECT_TRUE(same_bytes(loaded, weights));
  const Tokenizer tokenizer = byte_tokenizer();
  save_checkpoint(loaded, &tokenizer, folder / "again" / "");
  for (const char* name : {"config.json", "generation_config.json", "model.safetensors"})
    EXPECT_EQ(file_bytes(folder / "again" / name), file_bytes(place / name)) << name;
  EXPECT_TRUE(fs::exists(folder / "again/tokenizer.json"));
}

TEST_F(CheckpointTest, a_file_of_transformers_comes_back_byte_for_byte) {
  std::vector<const char*> folders(std::begin(kGoldenFamilies), std::end(kGoldenFamilies));
  folders.insert(folders.end(), std::begin(kGoldenOptions), std::end(kGoldenOptions));
  for (const char* family : folders) {
    const fs::path hf = fs::path(LOCKSTEP_TEST_DATA) / "hf" / family;
    save_checkpoint(load_checkpoint(hf), nullptr, folder / family);
    EXPECT_TRUE(file_bytes(folder / family / "model.safetensors") ==
                file_bytes(hf / "model.safetensors"))
        << family;
  }
}

TEST_F(CheckpointTest, every_family_survives_saving_and_loading_in_bf16_and_fp8) {
  int i = 0;
  for (const FamilyCase& f : family_cases(small_config())) {
    SCOPED_TRACE(f.name);
    Weights w = make_weights(f.config);
    initialize(w, 3);
    const fs::path at = folder / fmt::format("family{}", i++), fp8_at = at.string() + "-fp8";
    save_checkpoint(w, nullptr, at);
    EXPECT_TRUE(same_bytes(load_checkpoint(at), w));

    tensor::Arena workspace;
    const tensor::Context ctx = tensor::cpu_context(workspace, 1);
    Precision precision;
    precision.fp8 = true;
    const auto fp8 = quantized_for(ctx, w, precision);
    SaveOptions options;
    options.fp8 = fp8.get();
    save_checkpoint(w, nullptr, fp8_at, options);
    const Checkpoint opened = open_checkpoint(fp8_at);
    EXPECT_TRUE(has_fp8(opened));
    EXPECT_EQ(precision_of(opened), precision);
  }
}

TEST_F(CheckpointTest, padding_stays_zero_and_rows_land_in_their_place) {
  const Weights loaded = load_checkpoint(place);
  const Param& p = loaded.table.params[loaded.table.layers[1].gate_up];
  const Bf16* data = loaded.view(loaded.table.layers[1].gate_up).as<Bf16>();
  std::vector<bool> used(static_cast<std::size_t>(p.shape.count()));
  const SafetensorsFile opened = open_safetensors(file);
  for (const ParamPart& part : p.parts) {
    const auto* from = reinterpret_cast<const Bf16*>(opened.at(part.hf_name).bytes.data());
    for (std::int64_t r = 0; r < part.rows; ++r)
      for (std::int64_t k = 0; k < part.columns; ++k) {
        const std::int64_t at = part_row_offset(p, part, r) + k;
        EXPECT_EQ(data[at].bits, from[r * part.columns + k].bits);
        used[at] = true;
      }
  }
  for (std::size_t i = 0; i < used.size(); ++i) ASSERT_TRUE(used[i] || data[i].bits == 0) << i;
}

TEST_F(CheckpointTest, float32_and_float16_are_rounded_to_nearest_even) {
  Tensors t(file);
  const std::string name = "model.norm.weight";
  std::vector<float> f32(24, 1.0f);
  f32[1] = 1.0f + 0x1p-8f;             // a tie, down to even
  f32[2] = 1.0f + 3 * 0x1p-8f;         // a tie, up to even
  f32[3] = 1.0f + 0x1p-8f + 0x1p-20f;  // above the tie
  f32[4] = -0x1p-133f;                 // a BF16 subnormal
  std::vector<char> bytes(24 * 4);
  std::memcpy(bytes.data(), f32.data(), bytes.size());
  t.put(name, FileDtype::kF32, {24}, bytes);
  std::vector<std::uint16_t> f16(24, 0x3C00);
  f16[1] = 0x3C04;  // 1 + 2^-8
  f16[2] = 0x3C0C;  // 1 + 3 * 2^-8
  f16[3] = 0x8001;  // -2^-24
  f16[4] = 0x7BFF;  // 65504
  std::vector<char> half(24 * 2);
  std::memcpy(half.data(), f16.data(), half.size());
  t.put("model.layers.1.input_layernorm.weight", FileDtype::kF16, {24}, half);
  t.write(file);
  const Weights w = load_checkpoint(place);
  const Bf16* a = w.view(w.table.final_norm).as<Bf16>();
  EXPECT_EQ(a[0].bits, 0x3F80);
  EXPECT_EQ(a[1].bits, 0x3F80);
  EXPECT_EQ(a[2].bits, 0x3F82);
  EXPECT_EQ(a[3].bits, 0x3F81);
  EXPECT_EQ(a[4].bits, 0x8001);
  const Bf16* b = w.view(w.table.layers[1].input_norm).as<Bf16>();
  EXPECT_EQ(b[0].bits, 0x3F80);
  EXPECT_EQ(b[1].bits, 0x3F80);
  EXPECT_EQ(b[2].bits, 0x3F82);
  EXPECT_EQ(b[3].bits, 0xB380);
  EXPECT_EQ(b[4].bits, 0x4780);
}

TEST_F(CheckpointTest, tensors_that_do_not_fit_the_config_are_refused) {
  const Tensors good(file);
  const std::string name = "model.layers.1.mlp.experts.2.up_proj.weight";
  const auto refused = [&](auto change, std::initializer_list<std::string> parts) {
    Tensors t = good;
    change(t);
    t.write(file);
    expect_load_refused(parts);
  };
  refused([&](Tensors& t) { t.rows.erase(name); }, {file.string(), name, "missing"});
  refused(
      [&](Tensors& t) {
        t.put("extra", FileDtype::kBF16, {1}, {0, 0});
      },
      {file.string(), "extra", "no part"});
  refused(
      [&](Tensors& t) {
        t.rows[name].shape = {24, 10};
      },
      {file.string(), name, "[24, 10]", "[10, 24]"});
  refused(
      [&](Tensors& t) {
        t.rows["model.norm.weight"].shape = {1, 24};
      },
      {"model.norm.weight", "[1, 24]", "[24]"});
  refused([&](Tensors& t) { t.rows[name].dtype = FileDtype::kI16; }, {file.string(), name, "I16"});
  refused([&](Tensors& t) { t.rows[name].dtype = FileDtype::kF8E4M3; },
          {file.string(), name, "F8_E4M3"});
  for (const std::uint16_t bits : {0x7FC0, 0x7F80, 0xFF80})
    refused(
        [&](Tensors& t) {
          std::vector<char> bytes(480, 0);
          std::memcpy(bytes.data() + 2 * (3 * 24 + 5), &bits, 2);
          t.put(name, FileDtype::kBF16, {10, 24}, bytes);
        },
        {file.string(), name, "[3, 5]"});
  fs::remove(file);
  expect_load_refused({place.string(), "model.safetensors"});
  put_file(file, "short");
  expect_load_refused({file.string()});
}

TEST_F(CheckpointTest, a_config_of_another_model_is_refused_before_memory_is_taken) {
  json config = read_json_file(place / "config.json");
  config["vocab_size"] = 2000000000;
  put_file(place / "config.json", config.dump());
  expect_load_refused({"model.embed_tokens.weight", "[20, 24]", "[2000000000, 24]"});
}

TEST_F(CheckpointTest, tied_head_may_be_stored_twice_if_it_is_the_same) {
  const Weights tied = small_weights(true);
  save_checkpoint(tied, nullptr, place);
  Tensors t(file);
  EXPECT_FALSE(t.rows.count("lm_head.weight"));
  TensorToWrite head = t.rows.at("model.embed_tokens.weight");
  head.name = "lm_head.weight";
  t.rows["lm_head.weight"] = head;
  t.write(file);
  EXPECT_TRUE(same_bytes(load_checkpoint(place), tied));
  t.put("lm_head.weight", FileDtype::kBF16, {20, 24}, std::vector<char>(960, 1));
  t.write(file);
  expect_load_refused({file.string(), "lm_head.weight", "ties"});
}

// Layers behind the last one, as DeepSeek-V3 has them for multi-token prediction.
TEST_F(CheckpointTest, prediction_layers_are_passed_over_and_said) {
  const fs::path hf = fs::path(LOCKSTEP_TEST_DATA) / "hf/deepseek_v3", at = folder / "mtp";
  fs::create_directories(at);
  for (const char* name : {"config.json", "generation_config.json"})
    fs::copy_file(hf / name, at / name);
  Tensors t(hf / "model.safetensors");
  for (const char* name : {"model.layers.2.enorm.weight", "model.layers.2.mlp.gate.weight"})
    t.put(name, FileDtype::kF32, {1}, std::vector<char>(4));
  t.write(at / "model.safetensors");
  std::vector<std::string> lines;
  const Weights w =
      load_checkpoint(at, nullptr, [&](const std::string& line) { lines.push_back(line); });
  ASSERT_EQ(lines.size(), 1u);
  EXPECT_NE(lines[0].find("2 tensors of layers of multi-token prediction"), std::string::npos);
  EXPECT_TRUE(same_bytes(w, load_checkpoint(hf)));
  save_checkpoint(w, nullptr, folder / "again");
  convert(open_hf_source(at), folder / "converted", {});
  for (const char* name : {"again", "converted"}) {
    EXPECT_EQ(file_bytes(folder / name / "model.safetensors"),
              file_bytes(hf / "model.safetensors"));
    EXPECT_EQ(read_json_file(folder / name / "config.json").at("num_nextn_predict_layers"), 0);
  }
  t.put("model.layers.3.enorm.weight", FileDtype::kF32, {1}, std::vector<char>(4));
  t.write(at / "model.safetensors");
  expect_refused([&] { load_checkpoint(at); },
                 {"model.safetensors", "model.layers.3.enorm.weight"});
}

TEST_F(CheckpointTest, selection_bias_is_kept_when_there_is_one) {
  const std::string name = "model.layers.1.mlp.gate.e_score_correction_bias";
  EXPECT_FALSE(Tensors(file).rows.count(name));
  weights.router_bias.as<float>()[4] = 0.1f;
  save_checkpoint(weights, nullptr, place);
  const Weights loaded = load_checkpoint(place);
  for (int i = 0; i < 6; ++i) EXPECT_EQ(loaded.router_bias.as<float>()[i], i == 4 ? 0.1f : 0.0f);
  Tensors t(file);
  t.rows[name].dtype = FileDtype::kI32;
  t.write(file);
  expect_load_refused({file.string(), name, "I32"});
  t.rows.erase(name);
  t.write(file);
  expect_load_refused({file.string(), name, "missing"});
}

struct ShardedCheckpoint : CheckpointTest {
  json map = json::object();
  void SetUp() override {
    CheckpointTest::SetUp();
    const Tensors all(file);
    fs::remove(file);
    all.write(place / "a.safetensors", "layers.0");
    Tensors rest = all;
    for (const auto& [name, row] : all.rows) {
      const bool first = name.find("layers.0") != std::string::npos;
      map[name] = first ? "a.safetensors" : "b.safetensors";
      if (first) rest.rows.erase(name);
    }
    rest.write(place / "b.safetensors");
    put_index();
  }
  void put_index() {
    put_file(place / "model.safetensors.index.json",
             json{{"metadata", {{"total_size", 1}}}, {"weight_map", map}}.dump());
  }
};

TEST_F(ShardedCheckpoint, loads_the_same_weights) {
  EXPECT_TRUE(same_bytes(load_checkpoint(place), weights));
}

TEST_F(ShardedCheckpoint, a_wrong_index_is_refused) {
  const std::string name = "model.layers.1.mlp.gate.weight";
  const json good = map;
  for (const char* shard : {"../b.safetensors", "/etc/b.safetensors", "x/b.safetensors", "..",
                            ".b.safetensors", "", "x\\b.safetensors", "b.bin"}) {
    map = good;
    map[name] = shard;
    put_index();
    expect_load_refused({"index.json", name, "folder"});
  }
  map[name] = std::string("b\0/../c.safetensors", 19);
  put_index();
  expect_load_refused({"index.json", name});
  map[name] = 3;
  put_index();
  expect_load_refused({"index.json", name});
  map[name] = "a.safetensors";  // lies in b
  put_index();
  expect_load_refused({"a.safetensors", name, "missing"});
  map[name] = "0.safetensors";
  put_index();
  expect_load_refused({"0.safetensors"});
  map = good;
  map.erase(name);
  put_index();
  expect_load_refused({"b.safetensors", name, "not listed"});
  put_file(place / "model.safetensors.index.json", R"({"metadata": {}})");
  expect_load_refused({"index.json", "weight_map"});
  put_file(place / "model.safetensors.index.json",
           R"({"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}})");
  expect_load_refused({"index.json", "'x' twice"});
}

TEST_F(CheckpointTest, saving_replaces_a_checkpoint_and_nothing_else) {
  Weights other = small_weights();
  initialize(other, 8);
  save_checkpoint(other, nullptr, place);
  EXPECT_TRUE(same_bytes(load_checkpoint(place), other));
  put_file(place / "thesis.tex", "x");
  expect_refused([&] { save_checkpoint(weights, nullptr, place); }, {place.string(), "thesis.tex"});
  EXPECT_TRUE(same_bytes(load_checkpoint(place), other));
  put_file(folder / "file", "x");
  expect_refused([&] { save_checkpoint(weights, nullptr, folder / "file"); }, {"not a folder"});
  int entries = 0;  // model, file, and no temporary folder
  for ([[maybe_unused]] const auto& entry : fs::directory_iterator(folder)) ++entries;
  EXPECT_EQ(entries, 2);
}

TEST_F(CheckpointTest, a_save_that_is_killed_leaves_the_old_checkpoint) {
  Weights other = small_weights();
  initialize(other, 8);
  EXPECT_EXIT(
      {
        ::setenv("LOCKSTEP_FAILPOINT", "checkpoint_before_rename", 1);
        save_checkpoint(other, nullptr, place);
      },
      testing::KilledBySignal(SIGKILL), "");
  EXPECT_TRUE(same_bytes(load_checkpoint(place), weights));
}

}  // namespace
}  // namespace lockstep::model

// Checkpoint folders made to hurt: one clear refusal each, and little memory.
#include <sys/resource.h>

#include <nlohmann/json.hpp>

#include "model/convert.h"
#include "model/small_checkpoint.h"
#include "model/strict_json.h"

namespace lockstep::model {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

long peak_megabytes() {
  struct rusage usage {};
  ::getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss / 1024;
}

struct Hostile : TempFolderTest {
  fs::path place = folder / "model";
  long before = 0;
  void SetUp() override {
    TempFolderTest::SetUp();
    save_checkpoint(small_weights(), nullptr, place);
    before = peak_megabytes();
  }
  void TearDown() override {
    EXPECT_LT(peak_megabytes() - before, 200);
    TempFolderTest::TearDown();
  }
  void expect_load_refused(std::initializer_list<std::string> parts) {
    expect_refused([&] { load_checkpoint(place); }, parts);
    expect_refused([&] { open_hf_source(place); }, parts);
  }
  void with_config(const std::string& key, const json& value,
                   std::initializer_list<std::string> parts) {
    SCOPED_TRACE(key + " = " + value.dump());
    const std::string good = file_bytes(place / "config.json");
    json config = json::parse(good);
    config[key] = value;
    put_file(place / "config.json", config.dump());
    expect_load_refused(parts);
    put_file(place / "config.json", good);
  }
};

TEST_F(Hostile, configurations_of_impossible_models) {
  const std::string file = (place / "config.json").string();
  with_config("num_experts", 0, {file, "num_experts"});
  with_config("num_experts", -1, {file, "num_experts"});
  with_config("num_experts", std::int64_t{1} << 31, {file, "num_experts"});
  with_config("num_experts", 1e300, {file, "num_experts"});
  with_config("num_experts_per_tok", 4, {file, "num_experts_per_tok", "3"});
  with_config("num_experts_per_tok", 0, {file, "num_experts_per_tok"});
  with_config("head_dim", std::int64_t{1} << 30, {file});
  with_config("hidden_size", (std::int64_t{1} << 31) - 1, {place.string()});
  with_config("auto_map", json{{"AutoModelForCausalLM", "evil.Model"}}, {file, "auto_map"});
  with_config("architectures", json{"EvilForCausalLM"}, {file, "EvilForCausalLM"});
  with_config("trust_remote_code", true, {file, "trust_remote_code"});
}

TEST_F(Hostile, no_more_experts_are_believed_than_there_are_tensors) {
  with_config("num_experts", 1 << 20, {place.string(), "1048576 experts", "tensors"});
  with_config("num_hidden_layers", 1 << 20, {place.string(), "1048576 layers", "tensors"});
  // A slab of many experts that have no bytes.
  Tensors t(place / "model.safetensors");
  t.put("model.layers.0.mlp.experts.gate_up_proj", FileDtype::kBF16, {1 << 20, 0, 0}, {});
  t.write(place / "model.safetensors");
  with_config("num_experts", 1 << 20, {place.string(), "1048576 experts", "tensors"});
}

TEST_F(Hostile, json_a_million_deep) {
  for (const char* open : {"[", "{\"a\":"}) {
    std::string text = "{\"x\":";
    for (int i = 0; i < 1'000'000; ++i) text += open;
    for (const char* name : {"config.json", "generation_config.json"}) {
      const std::string good = file_bytes(place / name);
      put_file(place / name, text);
      expect_refused([&] { load_checkpoint(place); }, {name});
      put_file(place / name, good);
    }
    put_file(place / "x.safetensors", std::string(8, '\0'));
    const std::string good = file_bytes(place / "model.safetensors");
    fs::remove(place / "model.safetensors");
    put_file(place / "model.safetensors.index.json", text);
    expect_load_refused({"index.json"});
    fs::remove(place / "model.safetensors.index.json");
    put_file(place / "model.safetensors", good);
  }
}

TEST_F(Hostile, configuration_files_of_other_kinds) {
  for (const std::string bad :
       {"", "null", "[]", "{", "\xff\xfe", "{} {}", "{\"a\": 1, \"a\": 2}"}) {
    put_file(place / "config.json", bad);
    expect_load_refused({"config.json"});
  }
  put_file(place / "config.json", "{\"a\": \"" + std::string(2 << 20, 'x') + "\"}");
  expect_load_refused({"config.json"});
  fs::remove(place / "config.json");
  expect_load_refused({"config.json"});
  fs::create_directory(place / "config.json");
  expect_load_refused({"config.json"});
}

TEST_F(Hostile, a_bad_source_leaves_no_output) {
  Tensors t(place / "model.safetensors");
  std::vector<char> bytes(480, 0);
  bytes[101] = '\x7f', bytes[100] = '\x80';
  t.put("model.layers.1.mlp.experts.2.up_proj.weight", FileDtype::kBF16, {10, 24}, bytes);
  t.write(place / "model.safetensors");
  for (const StoreAs to : {StoreAs::kBf16, StoreAs::kFp8}) {
    ConvertOptions options;
    options.to = to;
    expect_refused([&] { convert(open_hf_source(place), folder / "out", options); },
                   {"model.layers.1.mlp.experts.2.up_proj.weight", "[2, 2]"});
    EXPECT_EQ(std::distance(fs::directory_iterator(folder), {}), 1);
  }
  put_file(folder / "notes.txt", "mine");
  expect_refused([&] { convert(open_hf_source(place), folder, {}); }, {"no part of a checkpoint"});
  EXPECT_TRUE(fs::exists(folder / "notes.txt"));
}

}  // namespace
}  // namespace lockstep::model

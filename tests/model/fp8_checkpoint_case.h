// A small block-FP8 folder to save, change and load.
#pragma once

#include "model/convert.h"
#include "model/families.h"
#include "model/fp8_import.h"
#include "model/hf_config.h"
#include "model/small_checkpoint.h"
#include "model/strict_json.h"

namespace lockstep::model {

namespace fs = std::filesystem;
using nlohmann::json;

// Ragged everywhere: 144 = 128 + 16 rows of q, 24 of k and v, experts of 136, hidden 200.
inline ModelConfig ragged_config() {
  ModelConfig c = small_config();
  c.hidden_size = 200;
  c.num_heads = 12;
  c.num_kv_heads = 2;
  c.head_dim = 12;
  c.moe_intermediate_size = 136;
  return c;
}

struct Fp8Checkpoint : TempFolderTest {
  fs::path place = folder / "fp8";
  fs::path file = place / "model.safetensors";
  tensor::Arena workspace;
  tensor::Context ctx = tensor::cpu_context(workspace, 1);
  Weights weights;
  Precision fp8;

  void SetUp() override {
    TempFolderTest::SetUp();
    fp8.fp8 = true;
    weights = make_weights(ragged_config());
    initialize(weights, 11);
    save(place);
  }
  void save(const fs::path& to, const SaveOptions& more = {}) {
    SaveOptions options = more;
    options.fp8 = quantized_for(ctx, weights, fp8).get();
    save_checkpoint(weights, nullptr, to, options);
  }
  std::vector<std::string> lines;
  Log log() {
    return [this](const std::string& line) { lines.push_back(line); };
  }
  struct Loaded {
    Weights weights;
    std::shared_ptr<QuantizedWeights> q;
  };
  Loaded load(const fs::path& from, const Precision& precision) {
    const Checkpoint c = open_checkpoint(from);
    Loaded out{make_weights(c.config), nullptr};
    read_weights(ctx, c, out.weights);
    out.q = import_fp8(ctx, c, out.weights, precision, log());
    return out;
  }
  void expect_load_refused(std::initializer_list<std::string> parts) {
    expect_refused([&] { load(place, fp8); }, parts);
  }
  void change_config(const std::function<void(json&)>& change) {
    json config = read_json_file(place / "config.json");
    change(config);
    put_file(place / "config.json", config.dump());
  }
};

inline void expect_same(const tensor::TensorView& a, const tensor::TensorView& b,
                        const std::string& what) {
  ASSERT_EQ(a.bytes(), b.bytes()) << what;
  EXPECT_EQ(std::memcmp(a.data, b.data, a.bytes()), 0) << what;
}

inline void expect_same_sets(const QuantizedWeights& a, const QuantizedWeights& b) {
  ASSERT_EQ(a.fp8, b.fp8);
  for (std::size_t p = 0; p < a.fp8.size(); ++p) {
    if (!a.fp8[p]) continue;
    const std::string what = "parameter " + std::to_string(p);
    expect_same(a.forward[p].codes_ENK, b.forward[p].codes_ENK, what + " codes");
    expect_same(a.forward[p].scales, b.forward[p].scales, what + " scales");
    expect_same(a.transposed[p].codes_ENK, b.transposed[p].codes_ENK, what + " transposed codes");
    expect_same(a.transposed[p].scales, b.transposed[p].scales, what + " transposed scales");
  }
}

inline void expect_same_files(const fs::path& a, const fs::path& b) {
  const SafetensorsFile x = open_safetensors(a), y = open_safetensors(b);
  ASSERT_EQ(x.tensors.size(), y.tensors.size());
  for (const auto& [name, t] : x.tensors) {
    const FileTensor& other = y.at(name);
    EXPECT_EQ(t.dtype, other.dtype) << name;
    EXPECT_EQ(t.shape, other.shape) << name;
    ASSERT_EQ(t.bytes.size(), other.bytes.size()) << name;
    EXPECT_EQ(std::memcmp(t.bytes.data(), other.bytes.data(), t.bytes.size()), 0) << name;
  }
}

}  // namespace lockstep::model

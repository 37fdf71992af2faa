// Block-FP8 folders: codes and scales byte for byte from the file to the engine and back.
#include <cmath>

#include "model/fp8_checkpoint_case.h"
#include "numerics/formats.h"

namespace lockstep::model {
namespace {

using numerics::Bf16;
using numerics::Fp8;

TEST_F(Fp8Checkpoint, file_has_the_names_shapes_and_types_that_engines_read) {
  const SafetensorsFile f = open_safetensors(file);
  const std::string q = "model.layers.0.self_attn.q_proj.weight";
  EXPECT_EQ(f.at(q).dtype, FileDtype::kF8E4M3);
  EXPECT_EQ(f.at(q).shape, (std::vector<std::int64_t>{144, 200}));
  EXPECT_EQ(f.at(q + "_scale_inv").dtype, FileDtype::kF32);
  EXPECT_EQ(f.at(q + "_scale_inv").shape, (std::vector<std::int64_t>{2, 2}));
  const std::string down = "model.layers.1.mlp.experts.2.down_proj.weight";
  EXPECT_EQ(f.at(down).shape, (std::vector<std::int64_t>{200, 136}));
  EXPECT_EQ(f.at(down + "_scale_inv").shape, (std::vector<std::int64_t>{2, 2}));
  EXPECT_EQ(f.at("model.layers.1.mlp.gate.weight").dtype, FileDtype::kBF16);
  EXPECT_EQ(f.at("lm_head.weight").dtype, FileDtype::kBF16);
  const json config = read_json_file(place / "config.json");
  EXPECT_EQ(config["quantization_config"],
            json::parse(R"({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                "weight_block_size": [128, 128], "modules_to_not_convert":
                ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"]})"));
}

// value = code * scale, computed here from the bytes of the file.
TEST_F(Fp8Checkpoint, bf16_weights_are_the_dequantized_values_rounded_once) {
  const SafetensorsFile f = open_safetensors(file);
  const Loaded loaded = load(place, fp8);
  const Param& param = loaded.weights.table.params[loaded.weights.table.layers[1].gate_up];
  const Bf16* data = loaded.weights.view(loaded.weights.table.layers[1].gate_up).as<Bf16>();
  for (const ParamPart& part : param.parts) {
    const auto* codes = reinterpret_cast<const Fp8*>(f.at(part.hf_name).bytes.data());
    std::vector<float> scales(4);
    std::memcpy(scales.data(), f.at(part.hf_name + "_scale_inv").bytes.data(), 16);
    for (std::int64_t r = 0; r < part.rows; ++r)
      for (std::int64_t k = 0; k < part.columns; ++k) {
        const float value = numerics::e4m3_to_float(codes[r * part.columns + k]) *
                            scales[static_cast<std::size_t>(r / 128 * 2 + k / 128)];
        ASSERT_EQ(data[part_row_offset(param, part, r) + k].bits, numerics::to_bf16(value).bits)
            << part.hf_name << " " << r << " " << k;
      }
  }
}

TEST_F(Fp8Checkpoint, load_and_save_give_every_tensor_back) {
  const Loaded loaded = load(place, fp8);
  EXPECT_TRUE(lines.empty());
  SaveOptions options;
  options.fp8 = loaded.q.get();
  save_checkpoint(loaded.weights, nullptr, folder / "again", options);
  expect_same_files(file, folder / "again/model.safetensors");
  EXPECT_EQ(file_bytes(place / "config.json"), file_bytes(folder / "again/config.json"));
}

// A DeepSeek-V3 file has kv_b_proj in FP8, too, which runs in BF16: its codes come back as well,
// until a step has changed the weights.
TEST_F(Fp8Checkpoint, codes_of_weights_that_run_in_bf16_come_back) {
  for (const FamilyCase& f : family_cases(ragged_config())) {
    if (!is_latent(f.config)) continue;
    SCOPED_TRACE(f.name);
    weights = make_weights(f.config);
    initialize(weights, 12);
    const auto q = quantized_for(ctx, weights, fp8);
    for (const LayerParams& layer : weights.table.layers) {
      EXPECT_FALSE(q->fp8[layer.kv_b]);
      const tensor::TensorView w = weights.view(layer.kv_b);
      const tensor::Tensor codes(tensor::Device::kCpu, tensor::DType::kE4m3, w.shape),
          scales(tensor::Device::kCpu, tensor::DType::kFp32,
                 {1, (w.dim(1) + 127) / 128, (w.dim(2) + 127) / 128});
      ops::quantize_weight(ctx, w, ops::WeightScales::kBlock128, false, {},
                           {codes, scales, ops::Scaling::kBlock}, {}, nullptr);
      q->stored.resize(q->fp8.size());
      q->stored[layer.kv_b] = {codes, scales, ops::Scaling::kBlock};
      q->stored_memory.insert(q->stored_memory.end(), {codes, scales});
    }
    fs::remove_all(place);
    save(place);
    const std::string kv_b = "model.layers.1.self_attn.kv_b_proj.weight";
    EXPECT_EQ(open_safetensors(file).at(kv_b).dtype, FileDtype::kF8E4M3);

    lines.clear();
    const Loaded loaded = load(place, fp8);
    ASSERT_EQ(lines.size(), 1u);
    EXPECT_NE(lines[0].find("kv_b_proj of 2 layers"), std::string::npos) << lines[0];
    EXPECT_EQ(precision_of(open_checkpoint(place)), fp8);
    SaveOptions options;
    options.fp8 = loaded.q.get();
    save_checkpoint(loaded.weights, nullptr, folder / "again", options);
    expect_same_files(file, folder / "again/model.safetensors");
    EXPECT_EQ(read_json_file(folder / "again/config.json"), read_json_file(place / "config.json"));

    Weights changed = loaded.weights;
    changed.quantized = {loaded.q};
    requantize(ctx, changed);
    save_checkpoint(changed, nullptr, folder / "changed", options);
    EXPECT_EQ(open_safetensors(folder / "changed/model.safetensors").at(kv_b).dtype,
              FileDtype::kBF16);
    convert(open_hf_source(place), folder / "converted", {});
    expect_same_files(file, folder / "converted/model.safetensors");
  }
}

TEST_F(Fp8Checkpoint, quantizing_before_saving_and_at_load_give_the_same_bytes) {
  save_checkpoint(weights, nullptr, folder / "bf16");
  Weights from_bf16 = load_checkpoint(folder / "bf16");
  expect_same_sets(*load(place, fp8).q, *quantized_for(ctx, from_bf16, fp8));
}

// Quantizing the dequantized weights again would give other bytes: scales that no quantizer makes.
TEST_F(Fp8Checkpoint, codes_and_scales_are_used_as_they_are) {
  Tensors t(file);
  for (auto& [name, row] : t.rows) {
    if (!name.ends_with("_scale_inv")) continue;
    auto* scale = static_cast<float*>(const_cast<void*>(row.data));
    for (std::int64_t i = 0; i < row.shape[0] * row.shape[1]; ++i) scale[i] *= 1.37f + 0.01f * i;
  }
  t.write(file);
  const Loaded loaded = load(place, fp8);
  SaveOptions options;
  options.fp8 = loaded.q.get();
  save_checkpoint(loaded.weights, nullptr, folder / "again", options);
  expect_same_files(file, folder / "again/model.safetensors");
  // Both copies agree, and the padding holds zeros.
  const auto& w = loaded.q->forward[loaded.weights.table.layers[0].down];
  const auto& wt = loaded.q->transposed[loaded.weights.table.layers[0].down];
  const std::int64_t N = w.codes_ENK.dim(1), K = w.codes_ENK.dim(2);
  ASSERT_EQ(K, 256);
  for (std::int64_t e = 0; e < 3; ++e)
    for (std::int64_t n = 0; n < N; ++n)
      for (std::int64_t k = 0; k < K; ++k) {
        const Fp8 code = w.codes_ENK.fp8()[(e * N + n) * K + k];
        ASSERT_EQ(code, wt.codes_ENK.fp8()[(e * K + k) * N + n]);
        ASSERT_TRUE(k < 136 || code == 0);
      }
  for (std::int64_t n = 0; n < 2; ++n)
    for (std::int64_t k = 0; k < 2; ++k)
      EXPECT_EQ(w.scales.as<float>()[4 + n * 2 + k], wt.scales.as<float>()[4 + k * 2 + n]);
  // Until the weights change.
  Weights changed = loaded.weights;
  requantize(ctx, changed);
  EXPECT_NE(std::memcmp(loaded.q->forward[loaded.weights.table.layers[0].o].scales.data,
                        w.scales.data, 4),
            0);
}

TEST_F(Fp8Checkpoint, a_precision_that_differs_uses_dequantized_values_and_says_so) {
  Precision some = fp8;
  some.num_last_layers_in_bf16 = 1;
  const Loaded loaded = load(place, some);
  ASSERT_EQ(lines.size(), 1u);
  EXPECT_NE(lines[0].find("13 of 26 FP8 tensors run in BF16"), std::string::npos) << lines[0];
  EXPECT_NE(lines[0].find(place.string()), std::string::npos);
  const int o = loaded.weights.table.layers[0].o;
  const Loaded all = load(place, fp8);
  expect_same(loaded.q->forward[o].codes_ENK, all.q->forward[o].codes_ENK, "layer 0");
  EXPECT_FALSE(loaded.q->fp8[loaded.weights.table.layers[1].o]);

  lines.clear();
  Precision rowwise = fp8;
  rowwise.recipe = Recipe::kRowwise;
  load(place, rowwise);
  ASSERT_EQ(lines.size(), 1u);
  EXPECT_NE(lines[0].find("quantized again"), std::string::npos) << lines[0];

  lines.clear();
  save_checkpoint(
      weights, nullptr, folder / "some",
      {quantized_for(ctx, weights, some).get(), FileDtype::kF32, 1 << 30, nullptr, nullptr});
  load(folder / "some", fp8);
  ASSERT_EQ(lines.size(), 1u);
  EXPECT_NE(lines[0].find("13 tensors that the file has in BF16"), std::string::npos) << lines[0];
}

TEST_F(Fp8Checkpoint, the_files_own_precision_is_known) {
  EXPECT_EQ(precision_of(open_checkpoint(place)), fp8);
  fp8.num_first_layers_in_bf16 = 1;
  save(folder / "some");
  const Checkpoint c = open_checkpoint(folder / "some");
  EXPECT_EQ(fp8_params(c.table, c.config, precision_of(c)), fp8_params(c.table, c.config, fp8));
  save_checkpoint(weights, nullptr, folder / "bf16");
  EXPECT_FALSE(precision_of(open_checkpoint(folder / "bf16")).fp8);
}

TEST_F(Fp8Checkpoint, power_of_two_scales_may_be_f32_bf16_or_e8m0) {
  fp8.weight_pow2 = true;
  for (const FileDtype dtype : {FileDtype::kF32, FileDtype::kBF16, FileDtype::kF8E8M0}) {
    SCOPED_TRACE(dtype_name(dtype));
    SaveOptions options;
    options.scales = dtype;
    save(place, options);
    EXPECT_EQ(read_json_file(place / "config.json")["quantization_config"]["scale_fmt"], "ue8m0");
    const Checkpoint c = open_checkpoint(place);
    EXPECT_EQ(scale_dtype(c), dtype);
    EXPECT_TRUE(precision_of(c).weight_pow2);
    const Loaded loaded = load(place, fp8);
    EXPECT_TRUE(lines.empty());
    expect_same_sets(*loaded.q, *quantized_for(ctx, weights, fp8));
    options.fp8 = loaded.q.get();
    save_checkpoint(loaded.weights, nullptr, folder / "again", options);
    expect_same_files(file, folder / "again/model.safetensors");
  }
  // A file with other scales does not serve a run that wants powers of two.
  fp8.weight_pow2 = false;
  save(place);
  fp8.weight_pow2 = true;
  load(place, fp8);
  EXPECT_EQ(lines.size(), 1u);
  SaveOptions options;
  options.scales = FileDtype::kF8E8M0;
  fp8.weight_pow2 = false;
  expect_refused([&] { save(folder / "no", options); }, {"_scale_inv", "exactly"});
}

TEST_F(Fp8Checkpoint, options_of_quantization_config) {
  const auto with = [&](const std::string& key, const json& value) {
    change_config([&](json& c) { c["quantization_config"][key] = value; });
  };
  change_config([](json& c) { c["quantization_config"].erase("fmt"); });
  with("scale_fmt", nullptr);
  with("ignored_layers", json{"lm_head"});
  with("modules_to_not_convert", nullptr);
  load(place, fp8);
  const json good = read_json_file(place / "config.json");
  const auto refused = [&](const std::string& key, const json& value) {
    put_file(place / "config.json", good.dump());
    with(key, value);
    expect_load_refused({"config.json", "quantization_config." + key});
  };
  refused("fmt", "e5m2");
  refused("quant_method", "gptq");
  refused("weight_block_size", json{64, 128});
  refused("weight_block_size", nullptr);
  refused("activation_scheme", "static");
  refused("scale_fmt", "e4m0");
  refused("ignored_layers", "lm_head");
  refused("ignored_layers", json{3});
  refused("bits", 8);
  put_file(place / "config.json", good.dump());
  change_config([](json& c) { c["quantization_config"].erase("weight_block_size"); });
  expect_load_refused({"weight_block_size is missing"});
  change_config([](json& c) { c["quantization_config"] = 3; });
  expect_load_refused({"quantization_config", "object"});
  change_config([](json& c) { c.erase("quantization_config"); });
  expect_load_refused({"F8_E4M3", "no quantization_config"});
  change_config([&](json& c) {
    c = good;
    c["quantization_config"]["modules_to_not_convert"] = {"model.layers.1.self_attn.o_proj"};
  });
  expect_load_refused({"model.layers.1.self_attn.o_proj.weight", "not converted"});
}

TEST_F(Fp8Checkpoint, bad_scales_and_codes_are_refused) {
  const Tensors good(file);
  const std::string name = "model.layers.1.mlp.experts.2.up_proj.weight";
  const std::string scale = name + "_scale_inv";
  const auto refused = [&](auto change, std::initializer_list<std::string> parts) {
    Tensors t(file);
    change(t);
    t.write(file);
    expect_load_refused(parts);
    good.write(file);
  };
  for (const float bad : {NAN, INFINITY, 0.0f, -1.0f})
    refused(
        [&](Tensors& t) { static_cast<float*>(const_cast<void*>(t.rows[scale].data))[3] = bad; },
        {file.string(), name, "[1, 1]", "positive"});
  refused([&](Tensors& t) { t.rows.erase(scale); }, {file.string(), name, "missing"});
  refused([&](Tensors& t) { t.rows[scale].shape = {4, 1}; }, {file.string(), scale, "[4, 1]"});
  refused([&](Tensors& t) { t.rows[scale].dtype = FileDtype::kI32; }, {scale, "I32"});
  refused([&](Tensors& t) { t.rows[name].shape = {200, 136}; }, {name, "[200, 136]"});
  refused(
      [&](Tensors& t) {
        static_cast<Fp8*>(const_cast<void*>(t.rows[name].data))[5 * 200 + 7] = 0xFF;
      },
      {file.string(), name, "[5, 7]"});
  refused(
      [&](Tensors& t) {
        t.put("model.norm.weight", FileDtype::kF8E4M3, {200}, std::vector<char>(200, 1));
      },
      {"model.norm.weight", "vector"});
  refused(  // overflows BF16
      [&](Tensors& t) { static_cast<float*>(const_cast<void*>(t.rows[scale].data))[0] = 0x1p127f; },
      {file.string(), name});
}

TEST_F(Fp8Checkpoint, shards_hold_at_most_the_size_that_was_asked_for) {
  SaveOptions options;
  options.max_shard_bytes = 100'000;
  save(folder / "shards", options);
  const json index = read_json_file(folder / "shards/model.safetensors.index.json");
  std::uint64_t total = 0;
  std::size_t shards = 0;
  for (const auto& entry : fs::directory_iterator(folder / "shards")) {
    if (entry.path().extension() != ".safetensors") continue;
    ++shards;
    std::uint64_t bytes = 0;
    for (const auto& [name, t] : open_safetensors(entry.path()).tensors) bytes += t.bytes.size();
    EXPECT_LE(bytes, 100'000u) << entry.path();
    total += bytes;
  }
  EXPECT_GT(shards, 4u);
  EXPECT_TRUE(
      fs::exists(folder / "shards" / fmt::format("model-00001-of-{:05}.safetensors", shards)));
  EXPECT_EQ(index["metadata"]["total_size"], total);
  expect_same_sets(*load(folder / "shards", fp8).q, *load(place, fp8).q);
  save(folder / "shards");  // one file replaces them
  EXPECT_FALSE(fs::exists(folder / "shards/model.safetensors.index.json"));
}

TEST(ByteSize, is_read_with_its_unit) {
  EXPECT_EQ(parse_byte_size("5GB", "x"), 5'000'000'000u);
  EXPECT_EQ(parse_byte_size("2GiB", "x"), std::uint64_t{2} << 30);
  EXPECT_EQ(parse_byte_size("12", "x"), 12u);
  for (const char* bad : {"", "GB", "5 GB", "-1GB", "5TBs", "0", "99999999999GB", "1.5GB"})
    expect_refused([&] { parse_byte_size(bad, "--max-shard-size"); }, {"--max-shard-size"});
}

}  // namespace
}  // namespace lockstep::model
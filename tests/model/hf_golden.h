// The golden data in tests/data/hf/<family>: what PyTorch computed for a tiny random checkpoint.
#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "model/checkpoint.h"
#include "model/reference.h"
#include "model/safetensors.h"

namespace lockstep::model {

// Any of the element types of the golden files, as double.
inline std::vector<double> golden_values(const SafetensorsFile& file, const std::string& name) {
  const FileTensor& t = file.at(name);
  std::vector<double> out(t.bytes.size() / dtype_item_bytes(t.dtype));
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::byte* at = t.bytes.data() + i * dtype_item_bytes(t.dtype);
    if (t.dtype == FileDtype::kF32) {
      float v;
      std::memcpy(&v, at, 4);
      out[i] = static_cast<double>(v);
    } else if (t.dtype == FileDtype::kI64) {
      std::int64_t v;
      std::memcpy(&v, at, 8);
      out[i] = static_cast<double>(v);
    } else if (t.dtype == FileDtype::kBF16) {
      numerics::Bf16 v;
      std::memcpy(&v, at, 2);
      out[i] = static_cast<double>(numerics::to_float(v));
    } else {
      base::fail<base::InputError>("golden tensor '{}' is {}", name, dtype_name(t.dtype));
    }
  }
  return out;
}

struct HfGolden {
  std::filesystem::path folder;
  Weights weights;
  SafetensorsFile reference, gradients;
  std::vector<std::vector<std::int32_t>> sequences;  // the rows of input_ids
  std::vector<std::int32_t> greedy;                  // row 0 and its 24 greedy tokens
};

inline HfGolden load_hf_golden_folder(const std::filesystem::path& folder) {
  HfGolden g;
  g.folder = folder;
  g.weights = load_checkpoint(g.folder);
  g.reference = open_safetensors(g.folder / "reference.safetensors");
  g.gradients = open_safetensors(g.folder / "gradients.safetensors");
  const auto ids = golden_values(g.reference, "input_ids");
  const std::int64_t rows = g.reference.at("input_ids").shape[0];
  const std::size_t length = ids.size() / static_cast<std::size_t>(rows);
  for (std::size_t at = 0; at < ids.size(); at += length)
    g.sequences.emplace_back(ids.begin() + at, ids.begin() + at + length);
  for (const double id : golden_values(g.reference, "greedy"))
    g.greedy.push_back(static_cast<std::int32_t>(id));
  return g;
}

inline HfGolden load_hf_golden(const std::string& family) {
  return load_hf_golden_folder(std::filesystem::path(LOCKSTEP_TEST_DATA) / "hf" / family);
}

// The reference as PyTorch computed the golden values: with the inverse rotary frequencies of the
// file, or, where it has none, rounded to BF16: the model had been converted to BF16 and back.
inline ReferenceModel golden_model(const HfGolden& g) {
  ReferenceModel model = reference_model(g.weights);
  if (g.reference.tensors.count("inverse_frequencies")) {
    model.inverse_frequencies = golden_values(g.reference, "inverse_frequencies");
    return model;
  }
  for (double& f : model.inverse_frequencies)
    f = static_cast<double>(numerics::round_bf16(static_cast<float>(f)));
  return model;
}

// The gradient norms are of PyTorch's parameters, which hold all experts of a layer in one, and
// call every family's experts `mlp`.
inline std::string golden_norm_name(std::string name) {
  const std::string mixtral = "block_sparse_moe";
  if (const auto at = name.find(mixtral); at != std::string::npos)
    name.replace(at, mixtral.size(), "mlp");
  const auto at = name.find(".experts.");
  if (at == std::string::npos) return name;
  const bool down = name.ends_with("down_proj.weight") || name.ends_with("w2.weight");
  return name.substr(0, at) + ".experts." + (down ? "down_proj" : "gate_up_proj");
}

inline const char* const kGoldenFamilies[] = {"qwen3_moe", "mixtral", "olmoe", "deepseek_v3"};
// Options on small models (tools/golden/{hf,deepseek}.py): dense layers, biases, bounds, tied
// embeddings, stretched rotary embeddings, three of five experts, widths that are no multiples of 8
// or 128, latent attention without a latent of the queries or with halves.
inline const char* const kGoldenOptions[] = {"qwen3",
                                             "llama",
                                             "llama_plain",
                                             "qwen2",
                                             "qwen3_moe_mixed",
                                             "qwen3_moe_step",
                                             "mixtral_tied",
                                             "olmoe_clip",
                                             "deepseek_v3_no_q_lora",
                                             "deepseek_v3_halves"};

}  // namespace lockstep::model

// A checkpoint folder in Hugging Face's layout, opened: config.json, and all tensors of
// model.safetensors or of the shards that model.safetensors.index.json lists, mapped.
#pragma once

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "model/fp8_format.h"
#include "model/safetensors.h"
#include "model/stored_weight.h"

namespace lockstep::model {

inline constexpr const char* kSingleFile = "model.safetensors";
inline constexpr const char* kIndexFile = "model.safetensors.index.json";

struct HfTensor {
  FileTensor tensor;
  std::string file;
};

struct HfFolder {
  std::filesystem::path folder;
  nlohmann::json config;         // config.json
  std::optional<Fp8Format> fp8;  // its quantization_config
  std::map<std::string, HfTensor> tensors;
  std::vector<SafetensorsFile> files;  // keep the mappings
  std::string where;                   // the file that lists the tensors, for messages
};

// Checks the headers of all files and that they and the index agree; no tensor byte is touched.
// Every refusal (a shard name that is not a plain file name of this folder, a tensor that is not
// where the index says, ...) is an InputError naming file and tensor.
HfFolder open_hf_folder(const std::filesystem::path& folder);

// The tensor of this name and shape as a weight; a matrix [rows, columns], or, when `vector`, a
// vector of rows * columns. A projection of an expert that has no tensor of its own is taken out of
// the fused slabs of transformers 5: P.experts.gate_up_proj [E, 2F, D] (gate rows first) and
// P.experts. down_proj [E, D, F], or both with the last two axes swapped; the two shapes together
// tell which. FP8 needs scales of the right shape, a fused slab of it F divisible by 128. Names of
// the tensors that were used are added to `used`. InputError naming file and tensor when there is
// none, or one of another shape or element type.
StoredWeight find_weight(const HfFolder& folder, const std::string& hf_name, std::int64_t rows,
                         std::int64_t columns, bool vector, std::int64_t experts,
                         std::set<std::string>& used);

}  // namespace lockstep::model

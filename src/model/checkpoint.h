// Weights on disk: a folder in Hugging Face's layout (config.json, generation_config.json,
// model.safetensors or shards with model.safetensors.index.json, tokenizer.json). What is read,
// written and refused: docs/checkpoints.md.
#pragma once

#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "model/hf_folder.h"
#include "model/hf_write.h"
#include "model/tokenizer.h"
#include "model/weights.h"

namespace lockstep::model {

using Log = std::function<void(const std::string& line)>;

// An opened checkpoint whose headers fit its config.json: every tensor of the parameter table is
// there with its shape and a supported type, and no other tensor is. No weight has been read.
struct Checkpoint {
  HfFolder folder;
  ModelConfig config;
  ParamTable table;
  std::vector<std::vector<StoredWeight>> parts;      // of table.params[p].parts[i]
  std::map<std::int64_t, StoredWeight> router_bias;  // by layer; empty without a selection bias
};

// Tensors are BF16, or F32 and F16, or F8_E4M3 with scales of blocks of 128 x 128 (a
// quantization_config says so). A missing, additional, misshaped or otherwise typed tensor, a shard
// outside of the folder, or a shard that disagrees with the index is an InputError naming file and
// tensor. Some may be there or not: with tied embeddings a lm_head.weight with the embedding's
// bytes; a selection bias of the routers (model.layers.N.mlp.gate.e_score_correction_bias, all
// layers with a router or none); layers behind the last one when config.json has
// num_nextn_predict_layers, which are passed over with a line to `log`.
Checkpoint open_checkpoint(const std::filesystem::path& folder, const Log& log = nullptr);

// Whether any tensor of the table is FP8 in the file.
bool has_fp8(const Checkpoint& checkpoint);

// The precision that runs in FP8 exactly what the file holds in FP8, and in BF16 the rest. BF16 for
// a file without FP8.
Precision precision_of(const Checkpoint& checkpoint);

// Fills the BF16 slab and the router bias of `weights` (made for checkpoint.config, on the
// context's device) piece by piece through a small buffer on the host. Values are rounded to BF16
// once, FP8 is dequantized. InputError names file, tensor and place of a NaN or an infinity.
void read_weights(const tensor::Context& ctx, const Checkpoint& checkpoint, Weights& weights,
                  const Progress& progress = nullptr);

// open_checkpoint and read_weights, on the CPU. The BF16 weights alone: the codes of an FP8
// checkpoint come by import_fp8 (model/fp8_import.h).
Weights load_checkpoint(const std::filesystem::path& folder, const Progress& progress = nullptr,
                        const Log& log = nullptr);

struct SaveOptions {
  // When set, its FP8 parameters and stored codes are written as codes and scales, others in BF16.
  const QuantizedWeights* fp8 = nullptr;  // recipe blockwise
  FileDtype scales = FileDtype::kF32;     // or kBF16, kF8E8M0 for scales that these hold exactly
  std::uint64_t max_shard_bytes = 5'000'000'000;
  Progress progress = nullptr;
  const tensor::Context* ctx = nullptr;  // of the weights' or codes' device when that is no host
};

// Writes the folder whole or not at all (write_hf_folder). The tokenizer may be null. The bytes
// depend on the weights alone, so load and save give the same file. A selection bias is written
// when it is not zero.
void save_checkpoint(const Weights& weights, const Tokenizer* tokenizer,
                     const std::filesystem::path& folder, const SaveOptions& options = {});

// The types of this weight's scales, as SaveOptions.scales; F32 for a checkpoint without FP8.
FileDtype scale_dtype(const Checkpoint& checkpoint);

// Shape of a part in the file.
std::vector<std::int64_t> part_shape(const Param& param, const ParamPart& part);

}  // namespace lockstep::model

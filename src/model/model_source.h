// A model as a list of named weights that still lie in their file: what conversions read, whatever
// format it came in.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "model/gguf.h"
#include "model/hf_folder.h"

namespace lockstep::model {

struct SourceTensor {
  enum Kind {
    kVector,  // a norm, a bias of a projection: BF16
    kBias,    // selection bias of a router: FP32
    kMatrix,  // embedding, head, router, kv_b_proj: BF16, unless the source has codes
    kLinear,  // a projection: BF16 or FP8
  };
  std::string name;  // in Hugging Face's layout
  Kind kind = kMatrix;
  StoredWeight weight;
};

struct ModelSource {
  nlohmann::json config, generation;  // config.json, generation_config.json
  std::map<std::string, std::string> tokenizer_files;
  std::vector<SourceTensor> tensors;
  std::optional<Fp8Format> fp8;        // the source has tensors of this format
  std::shared_ptr<const void> memory;  // keeps the bytes of the tensors
};

// A folder that open_checkpoint accepts, with the tokenizer files in it. What that passes over is
// said to `log`.
ModelSource open_hf_source(const std::filesystem::path& folder,
                           const std::function<void(const std::string& line)>& log = nullptr);

// A GGUF file of architecture llama (dense, or Mixtral's experts), qwen3 or qwen3moe, with the
// tokenizer in it. A key of the architecture or a tensor that is not known is an InputError naming
// it.
ModelSource open_gguf_source(const std::filesystem::path& file);

// tokenizer.json and tokenizer_config.json (with the chat template) from a GGUF file's keys
// tokenizer.*. Byte-level BPE (model gpt2) with pre-tokenizer gpt-2, smollm, llama-bpe or qwen2;
// others are refused by name.
std::map<std::string, std::string> gguf_tokenizer_files(const GgufFile& f);

}  // namespace lockstep::model

// Writes a checkpoint folder in Hugging Face's layout.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "model/safetensors.h"

namespace lockstep::model {

// Bytes done so far, and in all.
using Progress = std::function<void(std::uint64_t done, std::uint64_t total)>;

struct HfFolderToWrite {
  std::map<std::string, std::string> files;  // config.json and so on: name to content
  std::function<void(const std::filesystem::path&)> more_files = nullptr;  // writes into the folder
  std::vector<TensorToWrite> tensors;  // neighbours share a shard: codes and their scales
  std::uint64_t max_shard_bytes = 5'000'000'000;
  Progress progress = nullptr;  // of the tensors
};

// Tensors go to model.safetensors when they fit max_shard_bytes, else in the order of the list to
// shards model-0000i-of-0000N.safetensors that hold at most that much (a larger tensor has a shard
// of its own) with model.safetensors.index.json. The folder appears whole or not at all: a
// temporary folder beside it, then one rename. An existing folder is exchanged in one step, and
// must hold nothing but files that stand in a checkpoint (else InputError: nothing of the user's is
// deleted). The bytes depend on the arguments alone.
void write_hf_folder(const HfFolderToWrite& what, const std::filesystem::path& folder);

// Whether the file is one of a tokenizer, to be copied along with a checkpoint.
bool is_tokenizer_file(const std::string& name);

// "5GB" (10^9), "500MB", "2GiB" (2^30), "1000" -> bytes; else InputError naming `key`.
std::uint64_t parse_byte_size(const std::string& text, const std::string& key);

}  // namespace lockstep::model

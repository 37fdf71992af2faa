// Checkpoints from one format to another, tensor by tensor: the memory that it takes is that of the
// largest tensor, whatever the model's size. The bytes depend on the input and the options alone.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>

#include "model/hf_write.h"
#include "model/model_source.h"

namespace lockstep::model {

enum class StoreAs {
  kAsSource,  // FP8 stays FP8, everything else becomes BF16
  kBf16,
  kFp8,  // projections in blocks of 128 x 128; codes that the source has stay as they are
};

// A mixture of experts from a dense Llama model: every MLP is copied to all experts, the routers
// are random (normal, 0.02, from the seed). The weights of the chosen experts sum to one, so the
// function is the dense model's at first, to rounding. Written as Mixtral: the one architecture of
// this kind without norms on queries and keys, which the dense model does not have.
struct Upcycle {
  std::int64_t experts = 8;
  std::int64_t top_k = 2;
  std::uint64_t seed = 0;
};

// "experts=8,top_k=2" (also seed=N); InputError naming `key`.
Upcycle parse_upcycle(const std::string& text, const std::string& key);

// Changes the source in place. InputError when it is not dense Llama.
void upcycle(ModelSource& source, const Upcycle& options);

struct ConvertOptions {
  StoreAs to = StoreAs::kAsSource;
  bool ue8m0 = false;  // new scales are powers of two
  std::uint64_t max_shard_bytes = 5'000'000'000;
  Progress progress = nullptr;
};

// config.json is the source's with its quantization_config and dtype set to what is written and
// without layers of multi-token prediction; the
// tokenizer files are copied.
void convert(const ModelSource& source, const std::filesystem::path& output,
             const ConvertOptions& options);

}  // namespace lockstep::model

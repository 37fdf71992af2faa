// A checkpoint that is ready to run forward passes: what `score` and `generate` start from.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "model/forward.h"

namespace lockstep::loop {

struct ModelOptions {
  std::filesystem::path folder;
  std::string precision;  // bf16 | fp8; empty: FP8 where the file holds FP8, else BF16
  std::string device = "auto";
  std::int64_t num_threads = 0;
};

struct LoadedModel {
  tensor::Arena workspace;
  tensor::Context ctx;
  model::Weights weights;
  std::shared_ptr<model::QuantizedWeights> quantized;
  model::RopeTables rope;

  model::ModelView view() const { return {&weights, quantized.get(), rope.cos_PK, rope.sin_PK}; }
};

// An FP8 checkpoint's codes serve as they are. What does not match the precision is said on
// standard error. InputError for a folder that is no checkpoint.
std::unique_ptr<LoadedModel> load_model(const ModelOptions& options);

}  // namespace lockstep::loop

// Which linears run in FP8, and how. Precision is data: the same forward and backward read it.
// Embeddings, norms, routers, the head and kv_b_proj of latent attention (ADR 0008) never do.
#pragma once

#include <string>
#include <vector>

#include "ops/quantize.h"

namespace lockstep::model {

enum class Recipe { kBlockwise, kRowwise, kTensorwise };

struct Precision {
  bool fp8 = false;
  Recipe recipe = Recipe::kBlockwise;
  int num_first_layers_in_bf16 = 0;
  int num_last_layers_in_bf16 = 0;
  std::vector<std::string>
      ignored_layers;  // patterns (* and ? wildcards, or a plain substring) on Hugging Face names
  bool weight_pow2 = false;
  bool activation_pow2 = false;
  bool operator==(const Precision&) const = default;

  ops::Scaling scaling() const {
    return recipe == Recipe::kBlockwise ? ops::Scaling::kBlock : ops::Scaling::kRow;
  }
  ops::WeightScales weight_scales() const;
};

// "bf16" | "fp8"; "blockwise" | "rowwise" | "tensorwise". Anything else is an InputError naming
// `key`.
bool parse_precision(const std::string& text, const std::string& key);
Recipe parse_recipe(const std::string& text, const std::string& key);

}  // namespace lockstep::model

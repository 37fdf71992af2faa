#include "model/precision.h"

namespace lockstep::model {

using base::InputError;

ops::WeightScales Precision::weight_scales() const {
  switch (recipe) {
    case Recipe::kBlockwise:
      return ops::WeightScales::kBlock128;
    case Recipe::kRowwise:
      return ops::WeightScales::kPerRow;
    case Recipe::kTensorwise:
      return ops::WeightScales::kPerTensor;
  }
  base::fail<base::ContractError>("unknown recipe {}", static_cast<int>(recipe));
}

bool parse_precision(const std::string& text, const std::string& key) {
  if (text == "fp8") return true;
  if (text == "bf16" || text == "bfloat16") return false;
  base::fail<InputError>("{}: '{}' is not a precision; use bf16 or fp8", key, text);
}

Recipe parse_recipe(const std::string& text, const std::string& key) {
  if (text == "blockwise") return Recipe::kBlockwise;
  if (text == "rowwise") return Recipe::kRowwise;
  if (text == "tensorwise") return Recipe::kTensorwise;
  base::fail<InputError>("{}: '{}' is not an FP8 recipe; use blockwise, rowwise or tensorwise", key,
                         text);
}

}  // namespace lockstep::model

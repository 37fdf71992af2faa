// The quantization_config of a block-FP8 checkpoint, as DeepSeek and Qwen write it and vLLM and
// SGLang read it: E4M3 codes `X.weight` and scales `X.weight_scale_inv` with one value for each
// block of 128 x 128 (ragged edges as if padded with zeros); value = code * scale, despite "inv".
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

namespace lockstep::model {

struct Fp8Format {
  bool ue8m0 = false;                      // scales are powers of two
  std::vector<std::string> not_converted;  // modules in BF16
};

// The format that config.json names; nothing when it has no quantization_config. Every other
// method, block, element type or option is an InputError naming file and key.
std::optional<Fp8Format> parse_fp8_format(const nlohmann::json& config, const std::string& file);

nlohmann::json fp8_format_json(const Fp8Format& format);

// Whether the list names the module of tensor `hf_name` ("M.weight"): M itself, a module around it,
// or its last components.
bool names_module(const std::vector<std::string>& list, const std::string& hf_name);

// The modules of the tensors in BF16, for not_converted; all experts of a layer as one entry,
// "x.mlp.experts", where none of them is FP8.
std::vector<std::string> modules_in_bf16(const std::vector<std::string>& bf16_names,
                                         const std::vector<std::string>& fp8_names);

// "M.weight" -> "M".
std::string module_name(const std::string& hf_name);

// "M.weight" -> "M.weight_scale_inv", "M" -> "M_scale_inv" (slabs of experts).
std::string scale_name(const std::string& hf_name);

}  // namespace lockstep::model

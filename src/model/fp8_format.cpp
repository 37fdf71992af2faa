#include "model/fp8_format.h"

#include <set>

#include "base/error.h"

namespace lockstep::model {

using base::fail;
using base::InputError;
using nlohmann::json;

std::optional<Fp8Format> parse_fp8_format(const json& config, const std::string& file) {
  const auto found = config.find("quantization_config");
  if (found == config.end() || found->is_null()) return std::nullopt;
  if (!found->is_object())
    fail<InputError>("{}: quantization_config: expected an object, found {}", file,
                     found->type_name());
  if (found->empty()) return std::nullopt;
  const auto refuse = [&](const std::string& key, const json& value, const char* supported) {
    fail<InputError>("{}: quantization_config.{}: {} is not supported, only {}", file, key,
                     value.dump(), supported);
  };
  if (!found->contains("quant_method"))
    fail<InputError>("{}: quantization_config.quant_method is missing, expected \"fp8\"", file);
  if (found->at("quant_method") != "fp8")
    refuse("quant_method", found->at("quant_method"), "\"fp8\"");
  if (!found->contains("weight_block_size"))
    fail<InputError>(
        "{}: quantization_config.weight_block_size is missing: scales of a whole tensor or row are "
        "not supported, only blocks of [128, 128]",
        file);
  Fp8Format format;
  for (const auto& [key, value] : found->items()) {
    if (key == "quant_method") continue;
    if (key == "weight_block_size") {
      if (value != json{128, 128}) refuse(key, value, "[128, 128]");
    } else if (value.is_null()) {
      continue;
    } else if (key == "fmt") {
      if (value != "e4m3") refuse(key, value, "\"e4m3\"");
    } else if (key == "activation_scheme") {
      if (value != "dynamic") refuse(key, value, "\"dynamic\"");
    } else if (key == "scale_fmt") {
      if (value != "ue8m0" && value != "float") refuse(key, value, "\"ue8m0\" and \"float\"");
      format.ue8m0 = value == "ue8m0";
    } else if (key == "modules_to_not_convert" || key == "ignored_layers") {
      if (!value.is_array()) refuse(key, value, "a list of names");
      for (const json& name : value) {
        if (!name.is_string()) refuse(key, value, "a list of names");
        format.not_converted.push_back(name);
      }
    } else if (key == "dequantize") {
      if (value != false) refuse(key, value, "false");
    } else if (key == "is_checkpoint_fp8_serialized") {
      if (value != true) refuse(key, value, "true");
    } else {
      fail<InputError>("{}: quantization_config.{}: not a known key", file, key);
    }
  }
  return format;
}

json fp8_format_json(const Fp8Format& format) {
  json out = {{"quant_method", "fp8"},
              {"fmt", "e4m3"},
              {"activation_scheme", "dynamic"},
              {"weight_block_size", {128, 128}},
              {"modules_to_not_convert", format.not_converted}};
  if (format.ue8m0) out["scale_fmt"] = "ue8m0";
  return out;
}

// "x.experts.3.up_proj.weight" -> "x.experts"; empty for other names.
static std::string experts_module(const std::string& name) {
  const std::string mark = ".experts.";
  const std::size_t at = name.find(mark);
  return at == std::string::npos ? "" : name.substr(0, at + mark.size() - 1);
}

std::vector<std::string> modules_in_bf16(const std::vector<std::string>& bf16_names,
                                         const std::vector<std::string>& fp8_names) {
  std::set<std::string> in_fp8, listed;
  for (const std::string& name : fp8_names) in_fp8.insert(experts_module(name));
  std::vector<std::string> out;
  for (const std::string& name : bf16_names) {
    const std::string experts = experts_module(name);
    const bool whole = !experts.empty() && !in_fp8.count(experts);
    const std::string module = whole ? experts : module_name(name);
    if (listed.insert(module).second) out.push_back(module);
  }
  return out;
}

std::string module_name(const std::string& hf_name) {
  const std::string suffix = ".weight";
  return hf_name.ends_with(suffix) ? hf_name.substr(0, hf_name.size() - suffix.size()) : hf_name;
}

bool names_module(const std::vector<std::string>& list, const std::string& hf_name) {
  const std::string module = module_name(hf_name);
  for (const std::string& name : list)
    if (!name.empty() &&
        (module == name || module.starts_with(name + ".") || module.ends_with("." + name)))
      return true;
  return false;
}

std::string scale_name(const std::string& hf_name) { return hf_name + "_scale_inv"; }

}  // namespace lockstep::model

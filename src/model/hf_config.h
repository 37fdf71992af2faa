// Hugging Face's config.json and generation_config.json, read strictly and written. A key that
// changes the model and is not supported is refused by name: what loads is the model that the file
// describes. Keys that transformers writes and that change nothing (use_cache, ids of labels, keys
// that begin with '_') are passed over; any other key is refused too.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "model/config.h"

namespace lockstep::model {

// folder/config.json, and from folder/generation_config.json, when it is there, the
// end-of-sequence tokens (they replace those of config.json, as in transformers' generate). Every
// refusal is an InputError naming file and key. The result has passed validate().
ModelConfig read_hf_config(const std::filesystem::path& folder);

// The same from documents; `file` and `generation_file` stand in messages. A null generation
// document means that there is none.
ModelConfig parse_hf_config(const nlohmann::json& config, const std::string& file,
                            const nlohmann::json& generation, const std::string& generation_file);

// What read_hf_config reads back to the same ModelConfig and transformers (4 and 5) to its own.
nlohmann::json hf_config_json(const ModelConfig& config);
nlohmann::json hf_generation_json(const ModelConfig& config);

}  // namespace lockstep::model

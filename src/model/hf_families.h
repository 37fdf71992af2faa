// What each family's config.json holds beside the keys that all have.
#pragma once

#include "model/config.h"
#include "model/key_reader.h"

namespace lockstep::model {

// One row a family: what the file calls it, how it is read and written.
struct HfFamily {
  Family family;
  const char* architecture;
  ModelConfig (*read)(KeyReader&);
  nlohmann::json (*write)(const ModelConfig&);
};

// Keys that every family has. A theta_fallback of 0: rope_theta must be there.
void read_common(KeyReader& r, ModelConfig& config, double theta_fallback = 0);

// DeepSeek-V3 and what shares its architecture (Kimi-K2, Moonlight).
ModelConfig read_deepseek_v3(KeyReader& r);
nlohmann::json deepseek_v3_json(const ModelConfig& config);

// By the file's architectures and model_type; any that is not supported is refused by name.
const HfFamily& hf_family(KeyReader& r);
const HfFamily& hf_family(Family family);

}  // namespace lockstep::model

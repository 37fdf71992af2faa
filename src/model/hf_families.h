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

// By the file's architectures and model_type; any that is not supported is refused by name.
const HfFamily& hf_family(KeyReader& r);
const HfFamily& hf_family(Family family);

}  // namespace lockstep::model

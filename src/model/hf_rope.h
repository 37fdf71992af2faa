// The rotary embedding's keys of a config.json.
#pragma once

#include "model/config.h"
#include "model/key_reader.h"

namespace lockstep::model {

// rope_theta and rope_scaling as transformers 4 writes them, or the object rope_parameters of 5,
// into config.rope_theta and config.rope_scaling. rope_type: default, linear, llama3, yarn; any
// other is refused by name, and so is a key that the type does not have. A theta_fallback of 0:
// rope_theta must be there. config.max_positions has been read.
void read_rope(KeyReader& r, ModelConfig& config, double theta_fallback);

// The object rope_scaling, null where there is none.
nlohmann::json rope_scaling_json(const RopeScaling& scaling);

}  // namespace lockstep::model

// What the CUDA backend asks of a model's widths, known before anything runs. The CPU takes all.
#pragma once

#include <string>
#include <vector>

#include "model/parameters.h"

namespace lockstep::model {

// Empty where a GPU runs the model; else one clause that names the key of config.json (or the
// tensor) and its value. `fp8` by parameter, as of fp8_params(); empty: nothing runs in FP8.
std::string gpu_problem(const ModelConfig& config, const ParamTable& table,
                        const std::vector<bool>& fp8);

// InputError with that clause and the way out when the context's device is a GPU.
void check_widths(tensor::Device device, const ModelConfig& config, const ParamTable& table,
                  const std::vector<bool>& fp8);

}  // namespace lockstep::model

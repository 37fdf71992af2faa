// What a run is, in a few lines: printed before its first step, and written to its log. Every key
// stands in the run folder's config.yaml.
#pragma once

#include <string>
#include <vector>

#include "loop/config.h"
#include "loop/setup.h"
#include "model/parameters.h"
#include "policy/memory_plan.h"
#include "tensor/device.h"

namespace lockstep::loop {

// Elements of all tensors of the checkpoint, without the slab's padding.
std::int64_t parameter_count(const model::ParamTable& table);

// "model    models/demo: 0.96 M parameters, 4 layers, 8 experts (2 a token), fp8 blockwise". The
// rollout's precision is named where it is not the policy's.
std::string model_headline(const RunConfig& config, const model::ModelConfig& model,
                           std::int64_t parameters);
// "machine  cpu: avx512, 2 threads; numerics contract 1"; where `device: auto` found no GPU, why.
std::string machine_headline(const RunConfig& config, const tensor::Context& ctx);
// "memory   GiB planned: weights 8.1, optimizer 46.3, ...; 60.4 of 139.8 free". `cache` is what the
// rollout keeps keys and values in; 0: there is none.
std::string memory_headline(const policy::MemoryPlan& plan, std::size_t cache,
                            const tensor::DeviceMemory& memory);
// "activations 1.10 of 1.10 GiB, scratch 0.50 of 0.50 GiB": what a run took, and its plan.
std::string peak_memory_text(const policy::MemoryPlan& plan, const policy::Policy& policy);
// "run      runs/demo: config.yaml has every key"
std::string folder_headline(const RunConfig& config);

// All lines for reinforcement learning: model, task, machine, run.
std::vector<std::string> rl_headlines(const RunConfig& config, const model::ModelConfig& model,
                                      std::int64_t parameters, const tensor::Context& ctx);

}  // namespace lockstep::loop

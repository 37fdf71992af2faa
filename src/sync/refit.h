// From policy to rollout. In one process both read the same memory, so a refit is a change of
// version and nothing is copied; the checksum proves what the rollout reads.
#pragma once

#include <cstdint>
#include <string>

#include "model/forward.h"

namespace lockstep::sync {

// XXH3-128 in hexadecimal over the checksums of the pieces (ops/checksum.h) of everything that a
// forward pass under this view reads, in table order: codes and scales of parameters that run in
// FP8, BF16 values of the others, the routers' selection bias.
std::string weight_checksum(const model::ModelView& view);

struct RefitReport {
  std::uint64_t version = 0;
  std::int64_t bytes_copied = 0;
  std::string checksum;  // of what the rollout reads
};

// Makes the rollout's view current with the policy's weights. Both views must be of the same
// Weights object (ContractError otherwise); its FP8 codes were refreshed by the optimizer step.
RefitReport share(const model::ModelView& policy, const model::ModelView& rollout);

}  // namespace lockstep::sync

// What a step of the policy needs of a GPU's memory, found by running the largest micro-batch once.
#pragma once

#include "policy/policy.h"

namespace lockstep::policy {

struct MemoryPlan {
  std::size_t weights = 0;      // BF16 values and FP8 codes
  std::size_t optimizer = 0;    // masters, moments, gradients
  std::size_t activations = 0;  // saved for the backward
  std::size_t workspace = 0;
};

// Forward, head and backward of `sequences` sequences of `length` tokens (no update, no gradient is
// kept) and log-probabilities of `scored` such sequences, then one piece of memory for each arena,
// as large as that took: later steps that are no larger take no memory. SystemError where it does
// not fit. For GPUs; on the CPU, where memory is taken as needed, nothing runs and the last two are
// 0.
MemoryPlan plan_memory(Policy& policy, std::int64_t sequences, std::int64_t length,
                       std::int64_t scored = 0);

}  // namespace lockstep::policy

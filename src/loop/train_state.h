// What a checkpoint of a run holds besides its manifest: the policy with its optimizer, and where
// the run stood.
//   policy/weights/                Hugging Face folder (BF16), for other programs
//   policy/optimizer.safetensors   master (FP32), exp_avg, exp_avg_sq slabs, router_bias
//   training_info.json             counters below, contract version, weight checksum
#pragma once

#include <filesystem>

#include "model/tokenizer.h"
#include "policy/policy.h"

namespace lockstep::loop {

struct TrainState {
  std::int64_t step = 0;         // RL or pretraining steps done
  std::int64_t next_prompt = 0;  // next index of the data order
  std::int64_t total_valid_tokens = 0;
  std::string reference_checksum;  // of the KL penalty's reference weights; empty without one
};

// Writes into `folder`, which exists and is empty. Used inside save_checkpoint
// (checkpoint_store.h).
void write_train_state(const std::filesystem::path& folder, const policy::Policy& policy,
                       const model::Tokenizer& tokenizer, const TrainState& state);

// Reads it back into a policy of the same shape and publishes the weights; before the first update
// they are left as they are, because the codes of an FP8 file are not those of its BF16 values.
// InputError naming the
// file when anything does not fit: another model, moment dtype or contract version, or weights
// whose checksum is not the one that was saved.
TrainState read_train_state(const std::filesystem::path& folder, policy::Policy& policy);

}  // namespace lockstep::loop

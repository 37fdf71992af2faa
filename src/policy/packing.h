// Packing sequences into one forward batch: tokens of all sequences one after the other, without
// padding.
#pragma once

#include <span>
#include <vector>

#include "data/trajectory.h"
#include "model/forward.h"
#include "ops/vocab.h"

namespace lockstep::policy {

// A sequence of n tokens feeds its first n-1 to the model. Row r of the head is the hidden state at
// row_R[r], which predicts target_R[r]: token `position_R[r]` of sequence `sequence_R[r]`. Only
// tokens with loss_mask > 0 get a row.
struct Packed {
  model::ForwardBatch batch;
  std::int64_t tokens = 0;
  std::vector<std::int32_t> row_R, target_R, sequence_R, position_R;
};

// Tensors are taken from `arena`, of the context's device. A sequence of fewer than two tokens, or
// longer than max_positions
// + 1, is an InputError that names its index. At least one sequence.
Packed pack(const tensor::Context& ctx, tensor::Arena& arena,
            std::span<const data::TrainSequence> sequences, std::int64_t max_positions);

}  // namespace lockstep::policy

// From a plan to the operands of one forward, and from its hidden states to sampled tokens.
// T packed tokens, S sequences, P pages of the longest one, D model width, R draws, U distinct rows
// that are drawn from, V vocabulary.
#pragma once

#include <vector>

#include "model/forward.h"
#include "ops/vocab.h"
#include "rollout/scheduler.h"

namespace lockstep::rollout {

// Operands of the forward over the plan's items, in their order. They lie in ctx.workspace.
model::ForwardBatch make_batch(const tensor::Context& ctx, const StepPlan& plan, int block_size);

// Carries out the plan's page copies in every layer.
void copy_pages(const tensor::Context& ctx, const StepPlan& plan, int block_size,
                model::KvCache& cache);

struct Sampled {
  std::vector<std::int32_t> tokens;  // by draw
  std::vector<ops::RowStats> stats;
};

// What the sampler reads for the sequence's next token.
ops::RowSampling row_sampling(const Sequence& sequence);

// Draws one token from every row of hidden_UD, at most 2^24 logits at a time (at least one row).
// sampling and stats are device memory.
void sample_rows(const tensor::Context& ctx, const model::ModelView& model,
                 const tensor::TensorView& hidden_UD, const ops::RowSampling* sampling,
                 const tensor::TensorView& tokens_U, ops::RowStats* stats);

// Draws the plan's tokens from the hidden states of its forward. Logits of a row that several
// sequences draw from are computed once; at most 2^24 logits exist at a time (at least one row).
void sample_draws(const tensor::Context& ctx, const model::ModelView& model, const StepPlan& plan,
                  const tensor::TensorView& hidden_TD, Sampled& out);

}  // namespace lockstep::rollout

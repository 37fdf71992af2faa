// The language-model head on chosen rows: log-probabilities, entropy, and the backward. Logits of
// at most kHeadChunk rows exist at a time (docs/numerics.md, section 10).
#pragma once

#include <vector>

#include "model/forward.h"
#include "ops/vocab.h"

namespace lockstep::policy {

// stats[r] of target_R[r] under the logits of hidden row row_R[r]; `sampling` says temperature and
// filters (one for all rows).
std::vector<ops::RowStats> head_forward(const tensor::Context& ctx, const model::ModelView& model,
                                        const tensor::TensorView& hidden_TD,
                                        const std::vector<std::int32_t>& row_R,
                                        const std::vector<std::int32_t>& target_R,
                                        const ops::RowSampling& sampling);

// Writes d_hidden_TD (BF16; zero where a row is not in row_R) and adds the head weight's gradient
// to `grads`, from g_R = d loss / d logprob. Each row may appear once.
void head_backward(const tensor::Context& ctx, const model::ModelView& model,
                   const tensor::TensorView& hidden_TD, const std::vector<std::int32_t>& row_R,
                   const std::vector<std::int32_t>& target_R, const ops::RowSampling& sampling,
                   const std::vector<ops::RowStats>& stats, const std::vector<float>& g_R,
                   const tensor::TensorView& d_hidden_TD, const tensor::TensorView& grads);

}  // namespace lockstep::policy

// The language-model head on chosen rows: log-probabilities, entropy, and the backward. Logits of
// at most kHeadChunk rows exist at a time (docs/numerics.md, section 10).
#pragma once

#include <vector>

#include "model/forward.h"
#include "ops/vocab.h"
#include "policy/gradients.h"

namespace lockstep::policy {

// R rows of the hidden states and the tokens that they predict, on the device.
struct HeadRows {
  tensor::TensorView rows_R, targets_R;        // int32
  const ops::RowSampling* sampling = nullptr;  // [min(R, kHeadChunk)]: one for all rows
  ops::RowStats* stats = nullptr;              // [R], filled by head_forward
  std::int64_t count() const { return rows_R.dim(0); }
};

// `sampling` says temperature and filters. Room is taken from `arena`, of the context's device.
HeadRows make_head_rows(const tensor::Context& ctx, tensor::Arena& arena,
                        const std::vector<std::int32_t>& row_R,
                        const std::vector<std::int32_t>& target_R,
                        const ops::RowSampling& sampling);

// stats[r] of target r under the logits of its hidden row; also returned. Waits for the device.
std::vector<ops::RowStats> head_forward(const tensor::Context& ctx, const model::ModelView& model,
                                        const tensor::TensorView& hidden_TD, const HeadRows& rows);

// Writes d_hidden_TD (BF16; zero where a row is not among `rows`); the head weight's gradient goes
// to `grads`. From g_R = d loss / d logprob. Each row may appear once.
void head_backward(const tensor::Context& ctx, const model::ModelView& model,
                   const tensor::TensorView& hidden_TD, const HeadRows& rows,
                   const std::vector<float>& g_R, const tensor::TensorView& d_hidden_TD,
                   const Gradients& grads);

}  // namespace lockstep::policy

// The GPU's ops/vocab.h. Every pointer is device memory; nothing waits, and the launches depend on
// the shapes alone.
#pragma once

#include "ops/vocab.h"

namespace lockstep::ops::cuda {

// tokens_R is read where `draw` is false, written where it is true.
void vocab_rows(const Context& ctx, const TensorView& logits_RV, const RowSampling* sampling,
                bool draw, const TensorView& tokens_R, RowStats* stats);

void vocab_backward(const Context& ctx, const TensorView& logits_RV, const TensorView& targets_R,
                    const RowSampling* sampling, const RowStats* stats, const TensorView& g_R,
                    const TensorView& d_logits_RV);

}  // namespace lockstep::ops::cuda

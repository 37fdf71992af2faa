// The gradients of a step: one FP32 slab in the table's layout.
#pragma once

#include "model/parameters.h"

namespace lockstep::policy {

// Where a micro-batch's gradients go. The first of a step writes those of matrices over whatever
// the slab holds, and the others add (`accumulate`). Norms, biases and the embedding are always
// added to, so they start from zero_sums.
struct Gradients {
  tensor::TensorView slab;
  bool accumulate = false;

  tensor::TensorView view(const model::ParamTable& table, int p) const {
    return model::param_view(table, slab, p);
  }
};

// Zeroes what no matrix product writes: norms, biases, an embedding that is not the head, and the
// room between parameters. Before the first micro-batch of a step.
void zero_sums(const tensor::Context& ctx, const model::ParamTable& table,
               const tensor::TensorView& slab);

}  // namespace lockstep::policy

// Rows of BF16 copied by an index of rows, out of range clamped.
#pragma once

#include "ops/cuda/rows.cuh"
#include "ops/operand.h"

namespace lockstep::ops::cuda {

// out[r] = from[index[r]].
void gather_rows(const Context& ctx, const TensorView& from_TD, const TensorView& index_R,
                 const TensorView& out_RD);
// to[index[r]] = from[r], distinct entries.
void scatter_rows(const Context& ctx, const TensorView& from_RD, const TensorView& index_R,
                  const TensorView& to_TD);

}  // namespace lockstep::ops::cuda

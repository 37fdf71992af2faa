// Moving tokens to their experts and back (docs/numerics.md, sections 9, 11 and 12). M = T * C
// routed rows, sorted by (expert, token, slot). Nothing here depends on the number of threads.
#pragma once

#include "ops/quantize.h"

namespace lockstep::ops {

// The sort: segments.offsets_E1 and padded_offsets_E1 (each segment rounded up to 128), row_TC[t,
// c] = the row of that slot, token_M[row] = its token. All int32. An expert index outside [0, E) is
// a ContractError, as is a padded row count above the range of int32. Ops that read row_TC or
// token_M refuse entries out of range. On the GPU nobody can report an index out of range: there
// all these ops take the nearest one inside, so that nothing outside a tensor is read or written,
// and E is at most 1024.
void plan_permutation(const Context& ctx, const TensorView& experts_TC, const Segments& segments,
                      const TensorView& row_TC, const TensorView& token_M);

// out_MD[row] = h_TD[token_M[row]], BF16.
void permute(const Context& ctx, const TensorView& h_TD, const TensorView& token_M,
             const TensorView& out_MD);

// to_TD[row_R[r]] = from_RD[r], BF16; the entries of row_R (int32) are distinct, other rows of
// to_TD are left alone.
void scatter_rows(const Context& ctx, const TensorView& from_RD, const TensorView& row_R,
                  const TensorView& to_TD);

// y[t] = bf16(acc (+ shared[t])), acc = 0, then acc = fma(weights[t, c], o[row[t, c]], acc) in slot
// order; o_MD, shared_TD (may be empty), y_TD BF16, weights FP32.
void combine(const Context& ctx, const TensorView& o_MD, const TensorView& weights_TC,
             const TensorView& row_TC, const TensorView& shared_TD, const TensorView& y_TD);

// d_o[row[t, c]] = bf16(weights[t, c] * dy[t]); d_weights[t, c] = lane_sum of dy[t] * o[row[t, c]].
// Rows that no slot names are left alone (there are none after plan_permutation).
void combine_backward(const Context& ctx, const TensorView& dy_TD, const TensorView& o_MD,
                      const TensorView& weights_TC, const TensorView& row_TC,
                      const TensorView& d_o_MD, const TensorView& d_weights_TC);

// d_h[t] = bf16(acc), acc = 0, then one FP32 addition each: first[t], d_x[row[t, c]] in slot order,
// last[t]; first and last (BF16 [T, D]) may be empty.
void permute_backward(const Context& ctx, const TensorView& d_x_MD, const TensorView& row_TC,
                      const TensorView& first_TD, const TensorView& last_TD,
                      const TensorView& d_h_TD);

}  // namespace lockstep::ops

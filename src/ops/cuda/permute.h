#pragma once

#include "ops/permute.h"

namespace lockstep::ops::cuda {

inline constexpr std::int64_t kMaxSortBins = 1024;  // experts of plan_permutation

void plan_permutation(const Context& ctx, const TensorView& experts_TC, const Segments& segments,
                      const TensorView& row_TC, const TensorView& token_M);
void permute(const Context& ctx, const TensorView& h_TD, const TensorView& token_M,
             const TensorView& out_MD);
void scatter_rows(const Context& ctx, const TensorView& from_RD, const TensorView& row_R,
                  const TensorView& to_TD);
void combine(const Context& ctx, const TensorView& o_MD, const TensorView& weights_TC,
             const TensorView& row_TC, const TensorView& shared_TD, const TensorView& y_TD);
void combine_backward(const Context& ctx, const TensorView& dy_TD, const TensorView& o_MD,
                      const TensorView& weights_TC, const TensorView& row_TC,
                      const TensorView& d_o_MD, const TensorView& d_weights_TC);
void permute_backward(const Context& ctx, const TensorView& d_x_MD, const TensorView& row_TC,
                      const TensorView& first_TD, const TensorView& last_TD,
                      const TensorView& d_h_TD);

}  // namespace lockstep::ops::cuda

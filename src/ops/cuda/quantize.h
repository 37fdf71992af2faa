// ops/quantize.h and ops/permute_quantize.h on a GPU.
#pragma once

#include "ops/quantize.h"

namespace lockstep::ops::cuda {

void quantize_rows(const Context& ctx, const TensorView& x_MK, bool pow2, const Fp8Rows& out,
                   QuantStats* stats);
void quantize_columns(const Context& ctx, const TensorView& x_MN, const Segments& segments,
                      bool pow2, const Fp8Columns& out, QuantStats* stats);
void quantize_rows_columns(const Context& ctx, const TensorView& x_MN, const Segments& segments,
                           bool pow2, const Fp8Rows& rows, const Fp8Columns& columns,
                           QuantStats* stats);
void permute_quantize(const Context& ctx, const TensorView& h_TD, const TensorView& token_M,
                      const Segments& segments, bool pow2, const Fp8Rows& rows,
                      const Fp8Columns* columns, QuantStats* stats);
void quantize_weight(const Context& ctx, const TensorView& w_ENK, WeightScales kind, bool pow2,
                     const std::int64_t* part_rows, std::int64_t parts, const Fp8Weight& out,
                     const Fp8Weight& out_t, QuantStats* stats);
void dequantize_rows(const Context& ctx, const Fp8Rows& x, const TensorView& out_MK);
void dequantize_weight(const Context& ctx, const Fp8Weight& w, const TensorView& out_ENK);

}  // namespace lockstep::ops::cuda

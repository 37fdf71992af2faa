// Biases of linears, and the bound of OLMoE's queries, keys and values (docs/numerics.md, sections
// 7 and 11).
#pragma once

#include "ops/operand.h"

namespace lockstep::ops {

// out = bf16(x + bias), one rounding: x FP32 [T, N], a linear's sums; bias BF16 [N]; out BF16
// [T, N].
void add_bias(const Context& ctx, const TensorView& x_TN, const TensorView& bias_N,
              const TensorView& out_TN);

// d_bias FP32 [N] gets the sum of dy's rows (BF16 [T, N]) added: blocks of 128 rows from +0 each,
// row by row, blocks in ascending order onto a total that starts at +0, then d_bias + total.
void bias_backward(const Context& ctx, const TensorView& dy_TN, const TensorView& d_bias_N);

// x = x below -limit ? -limit : x above limit ? limit : x, in place; BF16, limit above 0. A NaN and
// -0 stay.
void clip(const Context& ctx, const TensorView& x, numerics::Bf16 limit);

// d = +0 wherever |x| >= limit, in place, where x is what clip() left: a value that lay exactly at
// the limit counts as cut.
void clip_backward(const Context& ctx, const TensorView& x, numerics::Bf16 limit,
                   const TensorView& d);

}  // namespace lockstep::ops

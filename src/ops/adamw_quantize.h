// AdamW on one weight and its FP8 codes, fused: the codes come from the values that the step holds
// anyway, so nothing is read twice (docs/numerics.md, sections 5 and 13).
#pragma once

#include "ops/optimizer.h"
#include "ops/quantize.h"

namespace lockstep::ops {

// grad, master FP32; m, v FP32 or BF16; w BF16: all [E, N, K]. Writes what
//   adamw(grad, options, master, m, v, w)
//   quantize_weight(w, WeightScales::kBlock128, pow2, {}, out, out_t, stats)
// write, to the same bits: out is [E, N, K] with scales of 128 x 128, out_t (may be empty) the copy
// with the axes swapped. stats may be null. ContractError as of the two.
void adamw_quantize(const Context& ctx, const TensorView& grad, const AdamwOptions& options,
                    const TensorView& master, const TensorView& m, const TensorView& v,
                    const TensorView& w, bool pow2, const Fp8Weight& out, const Fp8Weight& out_t,
                    QuantStats* stats);

}  // namespace lockstep::ops

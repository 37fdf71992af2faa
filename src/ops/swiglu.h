// SwiGLU on a fused gate | up slab, quantizing directly (docs/numerics.md, sections 7 and 11).
#pragma once

#include "ops/quantize.h"

namespace lockstep::ops {

// gate_up BF16 [M, 2F], gate in columns [0, F); a_MF = bf16(silu(gate) * up).
void swiglu(const Context& ctx, const TensorView& gate_up, const TensorView& a_MF);

// The FP32 value silu(gate) * up quantized without a BF16 step: row codes, and column codes when
// `columns` is not null. segments may be empty without columns, else they hold all rows. stats
// count the row codes only.
void swiglu_quantize(const Context& ctx, const TensorView& gate_up, const Segments& segments,
                     bool pow2, const Fp8Rows& rows, const Fp8Columns* columns, QuantStats* stats);

// d_gate_up BF16 [M, 2F] from d_a_MF BF16.
void swiglu_backward(const Context& ctx, const TensorView& gate_up, const TensorView& d_a_MF,
                     const TensorView& d_gate_up);

// swiglu_backward, its BF16 result quantized: row codes, and column codes when `columns` is not
// null (then the segments hold all rows). d_gate_up gets the BF16 values too, or is empty. stats
// count the row codes only.
void swiglu_backward_quantize(const Context& ctx, const TensorView& gate_up,
                              const TensorView& d_a_MF, const Segments& segments, bool pow2,
                              const TensorView& d_gate_up, const Fp8Rows& rows,
                              const Fp8Columns* columns, QuantStats* stats);

}  // namespace lockstep::ops

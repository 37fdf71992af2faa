// ops/swiglu.h on a GPU.
#pragma once

#include "ops/quantize.h"

namespace lockstep::ops::cuda {

void swiglu(const Context& ctx, const TensorView& gate_up, const TensorView& a_MF);
void swiglu_quantize(const Context& ctx, const TensorView& gate_up, const Segments& segments,
                     bool pow2, const Fp8Rows& rows, const Fp8Columns* columns, QuantStats* stats);
void swiglu_backward(const Context& ctx, const TensorView& gate_up, const TensorView& d_a_MF,
                     const TensorView& d_gate_up);
void swiglu_backward_quantize(const Context& ctx, const TensorView& gate_up,
                              const TensorView& d_a_MF, const Segments& segments, bool pow2,
                              const TensorView& d_gate_up, const Fp8Rows& rows,
                              const Fp8Columns* columns, QuantStats* stats);

}  // namespace lockstep::ops::cuda

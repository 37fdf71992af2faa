// The CPU's SwiGLU (ops/swiglu.h).
#pragma once

#include "ops/cpu/isa.h"
#include "ops/swiglu.h"

namespace lockstep::ops::cpu {

LOCKSTEP_CPU_DECLARE(void swiglu(const Context& ctx, const TensorView& gate_up,
                                 const TensorView& a_MF);
                     void swiglu_quantize(const Context& ctx, const TensorView& gate_up,
                                          const Segments& segments, bool pow2, const Fp8Rows& rows,
                                          const Fp8Columns* columns, QuantStats* stats);
                     void swiglu_backward(const Context& ctx, const TensorView& gate_up,
                                          const TensorView& d_a_MF, const TensorView& d_gate_up);)

}  // namespace lockstep::ops::cpu

// The CPU's quantizer (ops/quantize.h). Sources are BF16, and FP32 where SwiGLU quantizes its
// product directly.
#pragma once

#include "ops/cpu/isa.h"
#include "ops/quantize.h"

namespace lockstep::ops::cpu {

LOCKSTEP_CPU_DECLARE(
    void quantize_rows(const Context& ctx, const TensorView& x_MK, bool pow2, const Fp8Rows& out,
                       QuantStats* stats);
    void quantize_columns(const Context& ctx, const TensorView& x_MN, const Segments& segments,
                          bool pow2, const Fp8Columns& out, QuantStats* stats);
    void quantize_weight(const Context& ctx, const TensorView& w_ENK, WeightScales kind, bool pow2,
                         const std::int64_t* part_rows, std::int64_t parts, const Fp8Weight& out,
                         const Fp8Weight& out_t, QuantStats* stats);
    void dequantize_rows(const Context& ctx, const Fp8Rows& x, const TensorView& out_MK);
    void dequantize_weight(const Context& ctx, const Fp8Weight& w, const TensorView& out_ENK);)

}  // namespace lockstep::ops::cpu

// CPU forms of ops/gemm.h, arguments already checked.
#pragma once

#include "ops/cpu/isa.h"
#include "ops/gemm.h"

namespace lockstep::ops::cpu {

LOCKSTEP_CPU_DECLARE(
    void fp8_gemm(const Context& ctx, const Fp8Rows& a, const Fp8Weight& b,
                  const TensorView& offsets_E1, const TensorView& d_MN);
    void fp8_weight_gradient(const Context& ctx, const Fp8Columns& dy, const Fp8Columns& x,
                             const Segments& segments, bool accumulate, const TensorView& d_ENK);
    void bf16_gemm(const Context& ctx, const TensorView& a_MK, const TensorView& b, BLayout layout,
                   const TensorView& offsets_E1, const TensorView& d_MN);
    void bf16_weight_gradient(const Context& ctx, const TensorView& dy_MN, const TensorView& x_MK,
                              const TensorView& offsets_E1, bool accumulate,
                              const TensorView& d_ENK, std::int64_t chain_rows);)

}  // namespace lockstep::ops::cpu

// The CUDA implementation of ops::fp8_gemm (ops/gemm.h).
#pragma once

#include "ops/operand.h"

namespace lockstep::ops::cuda {

// K and N are multiples of 16; scales are plain FP32.
void fp8_gemm(const Context& ctx, const Fp8Rows& a, const Fp8Weight& b,
              const TensorView& offsets_E1, const TensorView& d_MN);

}  // namespace lockstep::ops::cuda

// BF16 products on the GPU (ops/gemm.h), arguments already checked.
#pragma once

#include "ops/gemm.h"

namespace lockstep::ops::cuda {

void bf16_gemm(const Context& ctx, const TensorView& a_MK, const TensorView& b, BLayout layout,
               const TensorView& offsets_E1, const TensorView& d_MN);

// Which tile is used; every one gives the same bits. Rows x columns of the output that a block
// computes; kSwap<n>: n rows, 128 columns.
enum class Bf16Plan { k128x256, k128x128, kSwap64, kSwap16 };
Bf16Plan plan_bf16_gemm(std::int64_t M, std::int64_t N, std::int64_t E);
void bf16_gemm(const Context& ctx, Bf16Plan plan, const TensorView& a_MK, const TensorView& b,
               BLayout layout, const TensorView& offsets_E1, const TensorView& d_MN);

}  // namespace lockstep::ops::cuda

// A BF16 product with free strides: the form for matrices whose rows do not lie at multiples of 16
// bytes, which the copy engine cannot load. mma.sync has the bits of wgmma (docs/numerics.md,
// section 4).
#pragma once

#include "ops/gemm.h"

namespace lockstep::ops::cuda {

// d[g][m, n] = sum_k a[m, k] b[g][n, k]; value (row, k) of an operand is at row * row_stride + k *
// k_stride (elements).
struct PlainGemm {
  const numerics::Bf16* a;
  std::int64_t a_row, a_k;
  const numerics::Bf16* b;
  std::int64_t b_row, b_k;
  void* d;  // row stride N
  bool d_is_fp32, accumulate;
  // Device memory, or null for one group. Rows are grouped: group g has the rows offsets[g] ..
  // offsets[g+1] of a and d, and b + g * N * K. The contraction is grouped: group g has that part
  // of k, and d + g * M * N.
  const std::int32_t* offsets;
  bool contraction_grouped;
  std::int64_t groups, M, N, K;
  // FP32: the contraction in pieces of so many, each added to d (the first as `accumulate` says).
  std::int64_t piece = std::int64_t{1} << 62;
};

void plain_gemm(const Context& ctx, const PlainGemm& x);

}  // namespace lockstep::ops::cuda

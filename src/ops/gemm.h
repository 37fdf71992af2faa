// Matrix products (docs/numerics.md, sections 4 and 6). Exact tensor-core arithmetic; no result
// depends on the tile, the thread count or the rows that travel along. Grouped forms take each
// expert's rows from `offsets`; empty experts are allowed. Errors: ContractError on shapes or
// dtypes that do not fit. K and N need not be multiples of anything on the CPU; a CUDA backend asks
// for multiples of 16.
#pragma once

#include "ops/operand.h"

namespace lockstep::ops {

// d[m, n] = sum_k a[m, k] b[e(m), n, k]. d: BF16 or FP32 [M, N]. offsets_E1 empty: one group (E =
// 1). Used for the forward (b = W) and the input gradient (b = W transposed).
void fp8_gemm(const Context& ctx, const Fp8Rows& a, const Fp8Weight& b,
              const TensorView& offsets_E1, const TensorView& d_MN);

// d[e, n, k] = sum over the rows m of segment e of dy[m, n] x[m, k]; FP32 [E, N, K]. accumulate: d
// = d + product; else d = +0 + product, the bits of adding to zeros, and d is not read.
void fp8_weight_gradient(const Context& ctx, const Fp8Columns& dy, const Fp8Columns& x,
                         const Segments& segments, bool accumulate, const TensorView& d_ENK);

// How b is stored: kNK has the contraction axis last, kKN has it first (an input gradient reads W
// that way).
enum class BLayout { kNK, kKN };

// d[m, n] = sum_k a[m, k] b[e(m)][n, k]; a BF16 [M, K], b BF16 [E, N, K] or [E, K, N], d BF16 or
// FP32 [M, N].
void bf16_gemm(const Context& ctx, const TensorView& a_MK, const TensorView& b, BLayout layout,
               const TensorView& offsets_E1, const TensorView& d_MN);

// d[e, n, k] = sum over the rows of segment e of dy[m, n] x[m, k]; BF16 inputs, FP32 [E, N, K].
// accumulate as above. chain_rows > 0 (a multiple of 64): a chain for every so many rows of a
// segment, from its first on, and their results added to d one after the other; 0: one chain.
void bf16_weight_gradient(const Context& ctx, const TensorView& dy_MN, const TensorView& x_MK,
                          const TensorView& offsets_E1, bool accumulate, const TensorView& d_ENK,
                          std::int64_t chain_rows = 0);

}  // namespace lockstep::ops

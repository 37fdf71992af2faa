// RMSNorm and rotary embedding of columns of wider rows (docs/numerics.md, sections 7 and 11), as
// latent attention has them: its projections leave several things side by side in one row, and a
// row of its cache is put together from two of them.
#pragma once

#include "ops/operand.h"

namespace lockstep::ops {

// A piece of every row, or of every head of every row: value i of head h of row t is slab_TN[t,
// column + h * stride + i]. With one head stride says nothing.
struct Columns {
  TensorView slab_TN;  // BF16 [T, N]
  std::int64_t column = 0, stride = 0;
};

// That the slab is BF16 with T rows, and that `heads` pieces of `width` lie inside a row side by
// side. ContractError with the name.
void require_pieces(const Columns& x, std::int64_t T, std::int64_t heads, std::int64_t width,
                    const char* name);

// rstd_T FP32 [T]; h = bf16((x * rstd) * w) over the D columns from x.column on. h may be x.
void rms_norm_columns(const Context& ctx, const Columns& x, const TensorView& w_D, float eps,
                      const Columns& h, const TensorView& rstd_T);

// d_x = bf16(norm backward of d_h); may be d_h. dw_D FP32, added to.
void rms_norm_columns_backward(const Context& ctx, const Columns& d_h, const Columns& x,
                               const TensorView& w_D, const TensorView& rstd_T, const Columns& d_x,
                               const TensorView& dw_D);

// How the pairs of a rotation lie in x. kHalves: pair i is (i, i + R/2); kInterleaved: (2i, 2i+1).
enum class RopePairs { kHalves, kInterleaved };

// out = rope(x) on `heads` pieces of width R. cos and sin FP32 [P, R/2], positions_T int32 (outside
// [0, P): a ContractError, on the GPU the nearest one inside). With (x1, x2) pair i of x:
// out[i] = bf16(fma(x1, cos, -(x2*sin))), out[i + R/2] = bf16(fma(x2, cos, x1*sin)): the result has
// its pairs as halves, however they lay in x. out may not overlap x.
void rope_columns(const Context& ctx, const Columns& x, std::int64_t heads, RopePairs pairs,
                  const TensorView& positions_T, const TensorView& cos_PR, const TensorView& sin_PR,
                  const Columns& out);

// The transpose: with d1 = d_out[i], d2 = d_out[i + R/2], pair i of d_x is bf16(fma(d1, cos,
// d2*sin)), bf16(fma(d2, cos, -(d1*sin))).
void rope_columns_backward(const Context& ctx, const Columns& d_out, std::int64_t heads,
                           RopePairs pairs, const TensorView& positions_T, const TensorView& cos_PR,
                           const TensorView& sin_PR, const Columns& d_x);

}  // namespace lockstep::ops

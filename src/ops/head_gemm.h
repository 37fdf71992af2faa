// Matrix products of every head with a weight of its own (docs/numerics.md, sections 4 and 6), as
// latent attention has them around its kernel. The heads' rows and results are columns of slabs,
// the weights rows of one tensor; nothing is copied. Errors: ContractError on shapes or dtypes that
// do not fit. On a GPU all widths, columns and strides are multiples of 8.
#pragma once

#include "ops/columns.h"
#include "ops/gemm.h"

namespace lockstep::ops {

// Rows [row, row + rows) of every head's matrix [N, L].
struct HeadRows {
  TensorView w_HNL;
  std::int64_t row = 0, rows = 0;
};

// kNK: d[t, h, n] = bf16(sum_l a[t, h, l] b[h, n, l]): a has width L, d has width rows.
// kKN: d[t, h, l] = bf16(sum_n a[t, h, n] b[h, n, l]): a has width rows, d has width L.
// b is BF16; the sum is one chain in ascending order. d may not overlap a.
void head_gemm(const Context& ctx, const Columns& a, const HeadRows& b, BLayout layout,
               const Columns& d);

// d[h, n, l] = sum_t y[t, h, n] x[t, h, l], FP32, one chain over all tokens; y has width rows, x
// has width L. accumulate: d = d + product; else d is written, and not read.
void head_weight_gradient(const Context& ctx, const Columns& y, const Columns& x, bool accumulate,
                          const HeadRows& d);

}  // namespace lockstep::ops

#pragma once

#include "ops/head_gemm.h"

namespace lockstep::ops::cuda {

// That the copy engine reaches every piece: columns, strides and rows at multiples of 16 bytes.
void require_chunks(const Columns& x, const char* name);

void head_gemm(const Context& ctx, const Columns& a, const HeadRows& b, BLayout layout,
               const Columns& d);
void head_weight_gradient(const Context& ctx, const Columns& y, const Columns& x, bool accumulate,
                          const HeadRows& d);

}  // namespace lockstep::ops::cuda

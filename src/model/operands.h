// Room in an arena for the FP8 operands of a GEMM (ops/operand.h).
#pragma once

#include "ops/operand.h"

namespace lockstep::model {

// Row codes of an [M, K] activation or gradient.
ops::Fp8Rows take_rows(tensor::Arena& arena, std::int64_t M, std::int64_t K, ops::Scaling scaling);

// Column codes of N columns over the segments' rows.
ops::Fp8Columns take_columns(tensor::Arena& arena, std::int64_t N, const ops::Segments& segments,
                             ops::Scaling scaling);

}  // namespace lockstep::model

// Room in an arena for the FP8 operands of a GEMM (ops/operand.h).
#pragma once

#include "ops/operand.h"

namespace lockstep::model {

// Row codes of an [M, K] activation or gradient.
ops::Fp8Rows take_rows(tensor::Arena& arena, std::int64_t M, std::int64_t K, ops::Scaling scaling);

// The most padded rows that M rows of so many experts can have: a segment of n > 0 rows takes
// ceil(n / 128) blocks. How the rows fall is known on the device only.
std::int64_t padded_capacity(std::int64_t M, std::int64_t experts);

// Column codes of N columns over M rows in the segments of so many experts.
ops::Fp8Columns take_columns(tensor::Arena& arena, std::int64_t N, std::int64_t M,
                             std::int64_t experts, ops::Scaling scaling);

}  // namespace lockstep::model

// Argument checks of ops that write or read FP8 operands (ops/operand.h). All throw ContractError
// with the operand's name. `capacity` below is R, the number of columns of an Fp8Columns.
#pragma once

#include "ops/operand.h"

namespace lockstep::ops {

void require_rows(const Fp8Rows& x, std::int64_t M, std::int64_t K, const char* name);
void require_weight(const Fp8Weight& w, std::int64_t E, std::int64_t N, std::int64_t K,
                    const char* name);
// R is read from the codes and must be a multiple of 128.
void require_columns(const Fp8Columns& x, std::int64_t E, std::int64_t N, const char* name);

// The two layouts of one tensor have one kind of scales. columns may be null.
void require_same_scaling(const Fp8Rows& rows, const Fp8Columns* columns, const char* name);

// Shapes, and on the CPU the values too: both tables start at 0 and ascend, no more than M rows,
// each padded segment is a multiple of 128 that holds its rows, and the last one ends within the
// capacity.
void require_segments(const Segments& segments, std::int64_t M, std::int64_t capacity);

// The same for an op that writes row codes and column codes: the segments hold all M rows.
void require_full_segments(const Segments& segments, std::int64_t M, std::int64_t capacity);

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace lockstep::ops

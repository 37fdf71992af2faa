// Gathering tokens for their experts and quantizing them in one op (docs/numerics.md, sections 5
// and 9): the same bits as permute followed by quantize_rows and quantize_columns.
#pragma once

#include "ops/permute.h"

namespace lockstep::ops {

// Row codes of h_TD[token_M[row]], and column codes in each expert's segment when `columns` is not
// null; then the segments hold all rows, and both have the same kind of scales. stats count the row
// codes only. On the CPU an entry of token_M outside [0, T) is a ContractError.
void permute_quantize(const Context& ctx, const TensorView& h_TD, const TensorView& token_M,
                      const Segments& segments, bool pow2, const Fp8Rows& rows,
                      const Fp8Columns* columns, QuantStats* stats);

}  // namespace lockstep::ops

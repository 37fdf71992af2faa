#include "ops/permute_quantize.h"

namespace lockstep::ops {

// The CPU gathers into scratch memory first: a BF16 copy costs little beside the codes.
void permute_quantize(const Context& ctx, const TensorView& h_TD, const TensorView& token_M,
                      const Segments& segments, bool pow2, const Fp8Rows& rows,
                      const Fp8Columns* columns, QuantStats* stats) {
  tensor::ArenaScope scope(*ctx.workspace);
  const TensorView gathered =
      ctx.workspace->take(tensor::DType::kBf16, {token_M.dim(0), h_TD.dim(1)});
  permute(ctx, h_TD, token_M, gathered);
  quantize_rows(ctx, gathered, pow2, rows, stats);
  if (columns != nullptr) quantize_columns(ctx, gathered, segments, pow2, *columns, nullptr);
}

}  // namespace lockstep::ops

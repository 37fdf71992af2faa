#include "ops/permute_quantize.h"

#include "ops/check.h"
#include "ops/cuda/call.h"
#include "ops/cuda/quantize.h"

namespace lockstep::ops {

using tensor::DType;
using tensor::require;

// The CPU gathers into scratch memory first: a BF16 copy costs little beside the codes.
void permute_quantize(const Context& ctx, const TensorView& h_TD, const TensorView& token_M,
                      const Segments& segments, bool pow2, const Fp8Rows& rows,
                      const Fp8Columns* columns, QuantStats* stats) {
  require(h_TD, DType::kBf16, {-1, -1}, "permute_quantize: h");
  require(token_M, DType::kInt32, {-1}, "permute_quantize: token");
  const std::int64_t M = token_M.dim(0), D = h_TD.dim(1);
  require_rows(rows, M, D, "permute_quantize: rows");
  if (columns != nullptr) {
    require_columns(*columns, segments.experts(), D, "permute_quantize: columns");
    require_same_scaling(rows, columns, "permute_quantize");
    require_full_segments(segments, M, columns->codes_NR.dim(1));
  }
  LOCKSTEP_CUDA_CALL(ctx, permute_quantize, ctx, h_TD, token_M, segments, pow2, rows, columns,
                     stats);
  const tensor::ArenaScope scope(*ctx.workspace);
  const TensorView gathered = ctx.workspace->take(DType::kBf16, {M, D});
  permute(ctx, h_TD, token_M, gathered);
  quantize_rows(ctx, gathered, pow2, rows, stats);
  if (columns != nullptr) quantize_columns(ctx, gathered, segments, pow2, *columns, nullptr);
}

}  // namespace lockstep::ops

#include "ops/swiglu.h"

#include "ops/check.h"
#include "ops/cpu/swiglu.h"
#include "ops/cuda/call.h"
#include "ops/cuda/swiglu.h"

namespace lockstep::ops {

using tensor::DType;
using tensor::require;
using tensor::Shape;

void swiglu(const Context& ctx, const TensorView& gate_up, const TensorView& a_MF) {
  require(a_MF, DType::kBf16, {-1, -1}, "swiglu: a");
  require(gate_up, DType::kBf16, {a_MF.dim(0), 2 * a_MF.dim(1)}, "swiglu: gate_up");
  LOCKSTEP_CUDA_CALL(ctx, swiglu, ctx, gate_up, a_MF);
  LOCKSTEP_CPU_CALL(ctx, swiglu, ctx, gate_up, a_MF);
}

void swiglu_quantize(const Context& ctx, const TensorView& gate_up, const Segments& segments,
                     bool pow2, const Fp8Rows& rows, const Fp8Columns* columns, QuantStats* stats) {
  require(gate_up, DType::kBf16, {-1, -1}, "swiglu_quantize: gate_up");
  const std::int64_t M = gate_up.dim(0), F = gate_up.dim(1) / 2;
  LOCKSTEP_CHECK(gate_up.dim(1) == 2 * F, "swiglu_quantize: odd width {}", gate_up.dim(1));
  require_rows(rows, M, F, "swiglu_quantize: rows");
  if (columns != nullptr) {
    require_columns(*columns, segments.experts(), F, "swiglu_quantize: columns");
    require_same_scaling(rows, columns, "swiglu_quantize");
    require_full_segments(segments, M, columns->codes_NR.dim(1));
  }
  LOCKSTEP_CUDA_CALL(ctx, swiglu_quantize, ctx, gate_up, segments, pow2, rows, columns, stats);
  LOCKSTEP_CPU_CALL(ctx, swiglu_quantize, ctx, gate_up, segments, pow2, rows, columns, stats);
}

void swiglu_backward(const Context& ctx, const TensorView& gate_up, const TensorView& d_a_MF,
                     const TensorView& d_gate_up) {
  require(d_a_MF, DType::kBf16, {-1, -1}, "swiglu_backward: d_a");
  const Shape slab{d_a_MF.dim(0), 2 * d_a_MF.dim(1)};
  require(gate_up, DType::kBf16, slab, "swiglu_backward: gate_up");
  require(d_gate_up, DType::kBf16, slab, "swiglu_backward: d_gate_up");
  LOCKSTEP_CUDA_CALL(ctx, swiglu_backward, ctx, gate_up, d_a_MF, d_gate_up);
  LOCKSTEP_CPU_CALL(ctx, swiglu_backward, ctx, gate_up, d_a_MF, d_gate_up);
}

void swiglu_backward_quantize(const Context& ctx, const TensorView& gate_up,
                              const TensorView& d_a_MF, const Segments& segments, bool pow2,
                              const TensorView& d_gate_up, const Fp8Rows& rows,
                              const Fp8Columns* columns, QuantStats* stats) {
  require(d_a_MF, DType::kBf16, {-1, -1}, "swiglu_backward_quantize: d_a");
  const std::int64_t M = d_a_MF.dim(0), N = 2 * d_a_MF.dim(1);
  require(gate_up, DType::kBf16, {M, N}, "swiglu_backward_quantize: gate_up");
  if (d_gate_up) require(d_gate_up, DType::kBf16, {M, N}, "swiglu_backward_quantize: d_gate_up");
  require_rows(rows, M, N, "swiglu_backward_quantize: rows");
  if (columns != nullptr) {
    require_columns(*columns, segments.experts(), N, "swiglu_backward_quantize: columns");
    require_same_scaling(rows, columns, "swiglu_backward_quantize");
    require_full_segments(segments, M, columns->codes_NR.dim(1));
  }
  LOCKSTEP_CUDA_CALL(ctx, swiglu_backward_quantize, ctx, gate_up, d_a_MF, segments, pow2, d_gate_up,
                     rows, columns, stats);
  const tensor::ArenaScope scope(*ctx.workspace);
  const TensorView d = d_gate_up ? d_gate_up : ctx.workspace->take(DType::kBf16, {M, N});
  swiglu_backward(ctx, gate_up, d_a_MF, d);
  quantize_rows(ctx, d, pow2, rows, stats);
  if (columns != nullptr) quantize_columns(ctx, d, segments, pow2, *columns, nullptr);
}

}  // namespace lockstep::ops

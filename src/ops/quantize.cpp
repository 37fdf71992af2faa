#include "ops/quantize.h"

#include <algorithm>

#include "numerics/contract.h"
#include "ops/check.h"
#include "ops/cpu/quantize.h"
#include "ops/cuda/call.h"
#include "ops/cuda/quantize.h"

namespace lockstep::ops {

using tensor::DType;
using tensor::require;

void QuantStats::add(const QuantStats& other) {
  values += other.values;
  saturated += other.saturated;
  flushed_to_zero += other.flushed_to_zero;
  blocks += other.blocks;
  zero_blocks += other.zero_blocks;
  nonfinite_blocks += other.nonfinite_blocks;
  if (amax_min == 0 || (other.amax_min != 0 && other.amax_min < amax_min))
    amax_min = other.amax_min;
  amax_max = std::max(amax_max, other.amax_max);
}

void quantize_rows(const Context& ctx, const TensorView& x_MK, bool pow2, const Fp8Rows& out,
                   QuantStats* stats) {
  require(x_MK, DType::kBf16, {-1, -1}, "quantize_rows: x");
  require_rows(out, x_MK.dim(0), x_MK.dim(1), "quantize_rows: out");
  LOCKSTEP_CUDA_CALL(ctx, quantize_rows, ctx, x_MK, pow2, out, stats);
  LOCKSTEP_CPU_CALL(ctx, quantize_rows, ctx, x_MK, pow2, out, stats);
}

void quantize_columns(const Context& ctx, const TensorView& x_MN, const Segments& segments,
                      bool pow2, const Fp8Columns& out, QuantStats* stats) {
  require(x_MN, DType::kBf16, {-1, -1}, "quantize_columns: x");
  require_columns(out, segments.experts(), x_MN.dim(1), "quantize_columns: out");
  require_segments(segments, x_MN.dim(0), out.codes_NR.dim(1));
  LOCKSTEP_CUDA_CALL(ctx, quantize_columns, ctx, x_MN, segments, pow2, out, stats);
  LOCKSTEP_CPU_CALL(ctx, quantize_columns, ctx, x_MN, segments, pow2, out, stats);
}

void quantize_rows_columns(const Context& ctx, const TensorView& x_MN, const Segments& segments,
                           bool pow2, const Fp8Rows& rows, const Fp8Columns& columns,
                           QuantStats* stats) {
  const std::int64_t M = x_MN.dim(0), N = x_MN.dim(1);
  require(x_MN, DType::kBf16, {-1, -1}, "quantize_rows_columns: x");
  require_rows(rows, M, N, "quantize_rows_columns: rows");
  require_columns(columns, segments.experts(), N, "quantize_rows_columns: columns");
  require_same_scaling(rows, &columns, "quantize_rows_columns");
  require_full_segments(segments, M, columns.codes_NR.dim(1));
  LOCKSTEP_CUDA_CALL(ctx, quantize_rows_columns, ctx, x_MN, segments, pow2, rows, columns, stats);
  quantize_rows(ctx, x_MN, pow2, rows, stats);
  quantize_columns(ctx, x_MN, segments, pow2, columns, nullptr);
}

void quantize_weight(const Context& ctx, const TensorView& w_ENK, WeightScales kind, bool pow2,
                     const std::vector<std::int64_t>& part_rows, const Fp8Weight& out,
                     const Fp8Weight& out_t, QuantStats* stats) {
  require(w_ENK, DType::kBf16, {-1, -1, -1}, "quantize_weight: w");
  const std::int64_t E = w_ENK.dim(0), N = w_ENK.dim(1), K = w_ENK.dim(2);
  const Scaling scaling = kind == WeightScales::kBlock128 ? Scaling::kBlock : Scaling::kRow;
  LOCKSTEP_CHECK(out.scaling == scaling && (!out_t.codes_ENK || out_t.scaling == scaling),
                 "quantize_weight: the outputs' scaling does not fit the kind of scales");
  require_weight(out, E, N, K, "quantize_weight: out");
  if (out_t.codes_ENK) require_weight(out_t, E, K, N, "quantize_weight: out_t");
  std::int64_t rows = 0;
  for (const std::int64_t part : part_rows) rows += part;
  LOCKSTEP_CHECK(part_rows.empty() || rows == N,
                 "quantize_weight: projections of {} rows do not make up a slab of {}",
                 fmt::join(part_rows, " + "), N);
  const std::int64_t* parts = part_rows.empty() ? &N : part_rows.data();
  const std::int64_t count = part_rows.empty() ? 1 : static_cast<std::int64_t>(part_rows.size());
  LOCKSTEP_CUDA_CALL(ctx, quantize_weight, ctx, w_ENK, kind, pow2, parts, count, out, out_t, stats);
  LOCKSTEP_CPU_CALL(ctx, quantize_weight, ctx, w_ENK, kind, pow2, parts, count, out, out_t, stats);
}

void dequantize_rows(const Context& ctx, const Fp8Rows& x, const TensorView& out_MK) {
  require(out_MK, DType::kBf16, {-1, -1}, "dequantize_rows: out");
  require_rows(x, out_MK.dim(0), out_MK.dim(1), "dequantize_rows: x");
  LOCKSTEP_CUDA_CALL(ctx, dequantize_rows, ctx, x, out_MK);
  LOCKSTEP_CPU_CALL(ctx, dequantize_rows, ctx, x, out_MK);
}

void dequantize_weight(const Context& ctx, const Fp8Weight& w, const TensorView& out_ENK) {
  require(out_ENK, DType::kBf16, {-1, -1, -1}, "dequantize_weight: out");
  require_weight(w, out_ENK.dim(0), out_ENK.dim(1), out_ENK.dim(2), "dequantize_weight: w");
  LOCKSTEP_CUDA_CALL(ctx, dequantize_weight, ctx, w, out_ENK);
  LOCKSTEP_CPU_CALL(ctx, dequantize_weight, ctx, w, out_ENK);
}

}  // namespace lockstep::ops

// The quantizer (docs/numerics.md, section 5): BF16 to E4M3 codes and FP32 scales. The same
// function serves checkpoints, policy, rollout and refit.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/operand.h"

namespace lockstep::ops {

// Health of what was quantized; counters add up over calls. Exact integers and extrema, so
// independent of threads. Padding counts nowhere. Of a weight, `out` is counted and its transposed
// copy is not.
struct QuantStats {
  std::int64_t values = 0;
  std::int64_t saturated = 0;        // |x * inv| > 464: without saturation it would round above 448
  std::int64_t flushed_to_zero = 0;  // x != 0 and the code is +-0
  std::int64_t blocks = 0;           // scales; of kPerTensor one per projection
  std::int64_t zero_blocks = 0;
  std::int64_t nonfinite_blocks = 0;
  float amax_min = 0;  // over blocks with a finite, non-zero amax; 0 when there is none
  float amax_max = 0;
  void add(const QuantStats& other);
};

// Row codes of x_MK (BF16): out.codes_MK E4M3 [M, K], out.scales FP32. stats may be null.
void quantize_rows(const Context& ctx, const TensorView& x_MK, bool pow2, const Fp8Rows& out,
                   QuantStats* stats);

// Column codes of x_MN (BF16) in each expert's segment: out.codes_NR E4M3 [N, R], zeros in the
// padding of a segment. kBlock: one scale per 128 tokens and column (a block of padding alone gets
// 1); kRow: one per segment and column (an empty segment gets 1). Codes and scales behind the last
// segment (padded_offsets[E] .. R) are left alone.
void quantize_columns(const Context& ctx, const TensorView& x_MN, const Segments& segments,
                      bool pow2, const Fp8Columns& out, QuantStats* stats);

// Row codes and column codes of the same tensor (BF16), as quantize_rows and quantize_columns write
// them, from one read. The segments hold all of its rows. stats count the row codes only.
void quantize_rows_columns(const Context& ctx, const TensorView& x_MN, const Segments& segments,
                           bool pow2, const Fp8Rows& rows, const Fp8Columns& columns,
                           QuantStats* stats);

enum class WeightScales {
  kBlock128,   // recipe blockwise: 128 x 128
  kPerRow,     // recipe rowwise
  kPerTensor,  // recipe tensorwise: one value per projection, stored once per row so that the GEMM
               // sees kRow
};

// Weight codes of w_ENK (BF16) and the copy with the axes swapped that the input gradient reads
// (out_t may be empty). kBlock128: out_t is the byte transpose with the transposed scale grid.
// kPerRow: out_t has scales of its own, one per column of w. kPerTensor: out has one scale per
// projection, out_t one per expert's slab, as its contraction runs over all of them. `part_rows`:
// rows of each projection of a fused slab (they add up to N; empty = one projection).
void quantize_weight(const Context& ctx, const TensorView& w_ENK, WeightScales kind, bool pow2,
                     const std::vector<std::int64_t>& part_rows, const Fp8Weight& out,
                     const Fp8Weight& out_t, QuantStats* stats);

// BF16 values of codes * scale, one rounding: for checkpoints and tests.
void dequantize_rows(const Context& ctx, const Fp8Rows& x, const TensorView& out_MK);
void dequantize_weight(const Context& ctx, const Fp8Weight& w, const TensorView& out_ENK);

}  // namespace lockstep::ops

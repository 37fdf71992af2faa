// Launching the tile kernel of ops/cuda/quantize_tile.cuh for one or both layouts of a tensor.
#pragma once

#include <algorithm>

#include "ops/cuda/launch.cuh"
#include "ops/cuda/quantize_tile.cuh"

namespace lockstep::ops::cuda {

// scales[i] from largest[i], i < n. stats may be null; with offsets, i / per_segment is a segment,
// and an empty one is not counted.
void scales_from_largest(const Context& ctx, const std::uint32_t* largest, std::int64_t n,
                         bool pow2, float* scales, QuantStats* stats, const std::int32_t* offsets,
                         std::int64_t per_segment);

// Zeroed scratch memory for `largest`.
std::uint32_t* take_largest(const Context& ctx, std::int64_t n);

inline bool aligned16(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

// Dynamic shared memory of this size, and the L1 cache's share for it.
template <typename Kernel>
void allow_shared_memory(Kernel kernel, int bytes) {
  tensor::check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
      "shared memory of a kernel");
  tensor::check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100),
      "shared memory of a kernel");
}

template <Pass kPass, typename Source>
void launch_tiles(const Context& ctx, const Source& source, const TilePlan& plan, bool vector) {
  const std::int64_t tiles = plan.row_tiles * ((plan.K + kQuantBlock - 1) / kQuantBlock);
  if (tiles == 0) return;
  LOCKSTEP_CHECK(tiles < std::int64_t{1} << 31, "quantize: {} tiles", tiles);
  const auto grid = static_cast<unsigned>(
      std::min<std::int64_t>(tiles, std::int64_t{kMultiprocessors} * Source::kCtas));
  constexpr int kStage = kStageBytes<Source>;
  const auto kernel =
      vector ? quantize_tiles<Source, kPass, true> : quantize_tiles<Source, kPass, false>;
  allow_shared_memory(kernel, kStage);
  kernel<<<grid, kTileThreads, kStage, stream_of(ctx)>>>(source, plan);
  LOCKSTEP_CUDA_LAUNCHED("quantize_tiles");
}

// Row codes and column codes of a source of M rows and kParts * K columns; either may be null, and
// columns == nullptr needs no segments. With columns the segments hold all M rows.
template <typename Source>
void quantize_source(const Context& ctx, const Source& source, std::int64_t M, std::int64_t K,
                     const Segments& segments, bool pow2, const Fp8Rows* rows,
                     const Fp8Columns* columns, QuantStats* stats) {
  const std::int64_t width = Source::kParts * K;
  TilePlan plan;
  plan.M = M, plan.K = K, plan.pow2 = pow2, plan.stats = stats;
  plan.segment_rows = M;
  plan.row_tiles = (M + kQuantBlock - 1) / kQuantBlock;
  bool vector = K % 8 == 0 && source.aligned();
  if (rows != nullptr) {
    plan.row_codes = rows->codes_MK.fp8();
    plan.row_scales = rows->scales.template as<float>();
    vector = vector && aligned16(plan.row_codes);
  }
  if (columns != nullptr) {
    plan.column_codes = columns->codes_NR.fp8();
    plan.column_scales = columns->scales.template as<float>();
    plan.column_stride = columns->codes_NR.dim(1);
    plan.offsets = segments.offsets_E1.template as<std::int32_t>();
    plan.padded = segments.padded_offsets_E1.template as<std::int32_t>();
    plan.experts = segments.experts();
    plan.row_tiles = plan.column_stride / kQuantBlock;
    vector = vector && aligned16(plan.column_codes);
  }
  if ((rows != nullptr ? rows->scaling : columns->scaling) == Scaling::kBlock) {
    launch_tiles<Pass::kBlocks>(ctx, source, plan, vector);
    return;
  }
  const tensor::ArenaScope scope(*ctx.workspace);
  const std::int64_t column_count = plan.experts * width;
  if (rows != nullptr) plan.row_largest = take_largest(ctx, M);
  if (columns != nullptr) plan.column_largest = take_largest(ctx, column_count);
  launch_tiles<Pass::kLargest>(ctx, source, plan, vector);
  if (rows != nullptr)
    scales_from_largest(ctx, plan.row_largest, M, pow2, plan.row_scales, stats, nullptr, 1);
  if (columns != nullptr)
    scales_from_largest(ctx, plan.column_largest, column_count, pow2, plan.column_scales,
                        rows != nullptr ? nullptr : stats, plan.offsets, width);
  launch_tiles<Pass::kEncode>(ctx, source, plan, vector);
}

}  // namespace lockstep::ops::cuda

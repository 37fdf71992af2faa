// Launching the tile kernel of ops/cuda/quantize_tile.cuh for one or both layouts of a tensor.
#pragma once

#include <algorithm>

#include "ops/cuda/launch.cuh"
#include "ops/cuda/quantize_tile.cuh"

namespace lockstep::ops::cuda {

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
void launch_tiles(const Context& ctx, const Source& source, TilePlan plan, bool vector) {
  plan.tickets = ctx.tickets;
  const std::int64_t column_tiles = (plan.K + kQuantBlock - 1) / kQuantBlock;
  const std::int64_t tiles = plan.row_tiles * column_tiles;
  // Segments without rows have scales of their columns nevertheless.
  const bool scales = kPass == Pass::kEncode && plan.column_largest != nullptr;
  if (plan.K == 0 || (tiles == 0 && !scales)) return;
  LOCKSTEP_CHECK(
      std::max(tiles, std::max(plan.row_tiles, column_tiles) * kQuantBlock) < std::int64_t{1} << 31,
      "quantize: {} rows of {} columns are too many", plan.M, plan.K);
  const auto grid = static_cast<unsigned>(
      std::clamp<std::int64_t>(tiles, 1, std::int64_t{kMultiprocessors} * Source::ctas(kPass)));
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
  const std::int64_t rows_largest = rows != nullptr ? M : 0;
  std::uint32_t* largest = take_largest(ctx, rows_largest + plan.experts * width);
  if (rows != nullptr) plan.row_largest = largest;
  if (columns != nullptr) plan.column_largest = largest + rows_largest;
  launch_tiles<Pass::kLargest>(ctx, source, plan, vector);
  launch_tiles<Pass::kEncode>(ctx, source, plan, vector);
}

}  // namespace lockstep::ops::cuda

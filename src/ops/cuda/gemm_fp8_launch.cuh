// Launches of the FP8 GEMM kernels. The kernels of one scaling are compiled in a file of their own.
#pragma once

#include "ops/cuda/gemm_fp8_few.cuh"
#include "ops/cuda/gemm_fp8_rows.cuh"
#include "ops/cuda/gemm_fp8_wide.cuh"
#include "ops/cuda/gemm_plan.h"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/tensor_map.h"

namespace lockstep::ops::cuda {

inline constexpr int kSharedBytes = 232448;  // a CTA's most on Hopper

struct GemmOperands {
  Fp8Rows a;
  Fp8Weight b;
  GemmArguments x;
};

inline CUtensorMap rows_map(const TensorView& codes_MK, int box_rows) {
  const std::int64_t M = codes_MK.dim(0), K = codes_MK.dim(1);
  return tensor_map(codes_MK.data, codes_MK.dtype, {{K, 1, 128}, {M, K, box_rows}},
                    CU_TENSOR_MAP_SWIZZLE_128B, "fp8_gemm a");
}
inline CUtensorMap weight_map(const TensorView& codes_ENK, int box_rows) {
  const std::int64_t E = codes_ENK.dim(0), N = codes_ENK.dim(1), K = codes_ENK.dim(2);
  return tensor_map(codes_ENK.data, codes_ENK.dtype, {{K, 1, 128}, {N, K, box_rows}, {E, N * K, 1}},
                    CU_TENSOR_MAP_SWIZZLE_128B, "fp8_gemm b");
}

// As many stages as fit. CTAs for the most tiles that M rows can make.
template <typename Shape, typename Kernel, typename... Maps>
void launch_gemm(const Context& ctx, Kernel kernel, GemmArguments x, const Maps&... maps) {
  const int lists = RowTiles::bytes(x.experts) + Shape::kQueueBytes;
  constexpr int kStage = Shape::kStageBytes + Shape::kScaleBytes + 16;
  x.stages = (kSharedBytes - Shape::kStaging - lists) / kStage;
  LOCKSTEP_CHECK(x.stages >= 2, "fp8_gemm: {} experts are too many for one product", x.experts);
  constexpr int kMostStages = 12;
  if (x.stages > kMostStages) x.stages = kMostStages;
  const int bytes = x.stages * kStage + Shape::kStaging + lists;
  const std::int64_t row_tiles = x.offsets == nullptr
                                     ? (x.M + Shape::kTileRows - 1) / Shape::kTileRows
                                     : x.M / Shape::kTileRows + (x.experts > x.M ? x.M : x.experts);
  const std::int64_t tiles = row_tiles * ((x.N + Shape::kColumns - 1) / Shape::kColumns);
  tensor::check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "fp8_gemm");
  const auto blocks = static_cast<unsigned>(tiles < kMultiprocessors ? tiles : kMultiprocessors);
  kernel<<<blocks, Shape::kThreads, static_cast<std::size_t>(bytes), stream_of(ctx)>>>(maps..., x);
  LOCKSTEP_CUDA_LAUNCHED("fp8_gemm");
}

template <Fp8Type kA, Fp8Type kB, Scaling kScaling>
void launch_rows(const Context& ctx, const GemmOperands& in) {
  launch_gemm<RowsShape>(ctx, fp8_rows_kernel<kA, kB, kScaling>, in.x, rows_map(in.a.codes_MK, 64),
                         weight_map(in.b.codes_ENK, RowsShape::kColumns));
}

template <Fp8Type kA, Fp8Type kB, Scaling kScaling>
void launch_few(const Context& ctx, const GemmOperands& in) {
  launch_gemm<FewShape>(ctx, fp8_few_kernel<kA, kB, kScaling>, in.x, rows_map(in.a.codes_MK, 8),
                        weight_map(in.b.codes_ENK, FewShape::kColumns));
}

template <Fp8Type kA, Fp8Type kB, Scaling kScaling>
void launch_wide(const Context& ctx, const GemmOperands& in) {
  using Shape = WideShape;
  GemmArguments x = in.x;
  x.tickets = ctx.tickets;
  const CUtensorMap a = rows_map(in.a.codes_MK, 64);
  const CUtensorMap b = weight_map(in.b.codes_ENK, Shape::kColumns);
  const CUtensorMap d =
      x.bf16 ? tensor_map(x.d, tensor::DType::kBf16,
                          {{x.N, 2, Shape::kPiece}, {x.M, 2 * std::int64_t{x.N}, Shape::kBoxRows}},
                          CU_TENSOR_MAP_SWIZZLE_128B, "fp8_gemm d")
             : a;  // not used
  launch_gemm<Shape>(ctx, fp8_wide_kernel<kA, kB, kScaling>, x, a, b, d);
}

// E4M3 on E4M3 has every plan; the other types, which no recipe uses, have two.
template <Fp8Type kA, Fp8Type kB, Scaling kScaling>
void launch_plan(const Context& ctx, const GemmOperands& in, GemmPlan plan) {
  if (plan == GemmPlan::kFew) return launch_few<kA, kB, kScaling>(ctx, in);
  if constexpr (kA == Fp8Type::kE4m3 && kB == Fp8Type::kE4m3)
    if (plan == GemmPlan::k128x256) return launch_wide<kA, kB, kScaling>(ctx, in);
  launch_rows<kA, kB, kScaling>(ctx, in);
}

template <Scaling kScaling>
void launch_types(const Context& ctx, const GemmOperands& in, GemmPlan plan) {
  const bool a_e4m3 = in.a.codes_MK.dtype == tensor::DType::kE4m3;
  const bool b_e4m3 = in.b.codes_ENK.dtype == tensor::DType::kE4m3;
  if (a_e4m3 && b_e4m3)
    launch_plan<Fp8Type::kE4m3, Fp8Type::kE4m3, kScaling>(ctx, in, plan);
  else if (a_e4m3)
    launch_plan<Fp8Type::kE4m3, Fp8Type::kE5m2, kScaling>(ctx, in, plan);
  else if (b_e4m3)
    launch_plan<Fp8Type::kE5m2, Fp8Type::kE4m3, kScaling>(ctx, in, plan);
  else
    launch_plan<Fp8Type::kE5m2, Fp8Type::kE5m2, kScaling>(ctx, in, plan);
}

void launch_block_scaled(const Context& ctx, const GemmOperands& in, GemmPlan plan);
void launch_row_scaled(const Context& ctx, const GemmOperands& in, GemmPlan plan);

}  // namespace lockstep::ops::cuda

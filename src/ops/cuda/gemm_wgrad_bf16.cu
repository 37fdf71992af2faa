// d[e, n, k] = sum over the rows m of segment e of dy[m, n] x[m, k], BF16: one chain over the rows
// in steps of 16 from the segment's first, or one for every chain_rows of them. Rows behind the
// segment's end belong to others: they are made zero in shared memory.
#include <algorithm>

#include "ops/cuda/gemm_plain.h"
#include "ops/cuda/gemm_wgrad.cuh"
#include "ops/cuda/gemm_wgrad.h"
#include "ops/cuda/head_gemm.h"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/tensor_map.h"

namespace lockstep::ops::cuda {
namespace {

using numerics::Bf16;
using tensor::DType;

constexpr int kDepth = 64;           // rows a stage
constexpr int kSlab = kDepth * 128;  // [rows, 64 columns] of an operand

// A stage: slabs of dy, then those of x.
struct Tile : WgradTile {
  static constexpr int kSlabs = (kRows + kColumns) / 64;
  static constexpr int kStageBytes = kSlabs * kSlab;
  static constexpr int kStages = kStageMemory / kStageBytes;
  static constexpr int kAllShared = kStages * kStageBytes + kShared;
};

// Rows [begin, end) of the stage's slabs to zero; all warpgroups that multiply.
__device__ void clear_rows(std::uint32_t stage, int begin, int end) {
  const int units = (end - begin) * 8;  // of 16 bytes, in each slab
  for (int u = static_cast<int>(threadIdx.x); u < units; u += 128 * Tile::kWarpgroups)
    for (int slab = 0; slab < Tile::kSlabs; ++slab)
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(
                       stage + static_cast<std::uint32_t>(slab * kSlab + begin * 128 + u * 16)),
                   "r"(0)
                   : "memory");
  fence_async_shared();
  named_sync(1, 128 * Tile::kWarpgroups);
}

template <bool kAccumulate>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    bf16_wgrad_kernel(const __grid_constant__ CUtensorMap dy_map,
                      const __grid_constant__ CUtensorMap x_map,
                      const __grid_constant__ CUtensorMap d_map, const WeightGradient x,
                      const int chain_rows, const bool heads) {
  extern __shared__ unsigned char shared[];
  const StageRing<Tile::kStages, Tile::kStageBytes> ring(shared);
  if (threadIdx.x == 0) {
    for (int w = 0; w < Tile::kWarpgroups; ++w) WgradBoxes::of(ring, w).init();
  }
  ring.init(4 * Tile::kWarpgroups);
  const int warpgroup = warpgroup_index();
  const int tiles = Tile::count(x);
  RingPosition<Tile::kStages> at;

  if (warpgroup == Tile::kWarpgroups) {
    give_registers<Tile::kOtherRegisters>();
    const int warp = static_cast<int>(threadIdx.x) / 32 - 4 * Tile::kWarpgroups;
    if (!elect_one()) return;
    if (warp > Tile::kWarpgroups) return;
    if (warp > 0)
      return move_results<kAccumulate>(x, &d_map, WgradBoxes::of(ring, warp - 1), warp - 1);
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles;
         tile += static_cast<int>(gridDim.x)) {
      const WgradPlace place = Tile::place(x, tile);
      const int first = x.offsets_E1 == nullptr ? 0 : x.offsets_E1[place.expert];
      const int last = x.offsets_E1 == nullptr ? x.M : x.offsets_E1[place.expert + 1];
      for (int row = first; row < last; row += kDepth, at.advance()) {
        const std::uint32_t barrier = ring.start_fill(at, Tile::kStageBytes), to = ring.stage(at);
        for (int slab = 0; slab < Tile::kSlabs; ++slab)
          tma_load_3d(to + static_cast<std::uint32_t>(slab * kSlab),
                      slab < Tile::kWarpgroups ? &dy_map : &x_map, barrier,
                      slab < Tile::kWarpgroups ? place.row + slab * 64
                                               : place.column + (slab - Tile::kWarpgroups) * 64,
                      heads ? place.expert : 0, row);
      }
    }
    return;
  }

  take_registers<Tile::kRegisters>();
  const WgradBoxes boxes = WgradBoxes::of(ring, warpgroup);
  float acc[Tile::kValues], done[Tile::kValues];
  // Continues the chain (or starts it) with the next stage, of whose rows `left` are the expert's;
  // returns the stage. With left <= 0 the product is of whatever the stage holds, for nobody: the
  // compiler wants no branch around it.
  const auto multiply = [&](int left, bool start) {
    const int stage = at.stage;
    const std::uint32_t operands = ring.stage(stage);
    if (left > 0) {
      ring.wait_full(at);
      at.advance();
      if (left < kDepth) clear_rows(operands, left, kDepth);
    }
    const std::uint32_t dy = operands + static_cast<std::uint32_t>(warpgroup * kSlab);
    const std::uint32_t columns = operands + Tile::kWarpgroups * kSlab;
    keep_registers(acc);
    wgmma_fence();
#pragma unroll
    for (std::uint32_t k = 0; k < kDepth; k += 16)
      wgmma_bf16<Major::kMn, Major::kMn>(acc, operand_128b(dy + k * 128, 1024, kSlab),
                                         operand_128b(columns + k * 128, 1024, kSlab),
                                         !start || k > 0);
    wgmma_commit();
    keep_registers(acc);
    return stage;
  };
  // The results of a chain leave while the first product of the next is computed.
  bool any = false, first_of_tile = false, last_of_tile = false;  // of the chain in `done`
  std::uint32_t parity = 0;
  const auto leave = [&] {
    if (!any) return;
    if (first_of_tile) {
      mbarrier_wait(boxes.ready, parity);
      parity ^= 1;
      put_results<kAccumulate>(boxes, done);
    } else {
      put_results<true>(boxes, done);
    }
    if (last_of_tile) give_boxes(boxes);
  };
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
    const int expert = Tile::place(x, tile).expert;
    const int rows =
        x.offsets_E1 == nullptr ? x.M : x.offsets_E1[expert + 1] - x.offsets_E1[expert];
    int begin = 0;
    do {
      const int end = min(rows, begin + chain_rows);
      int held = multiply(rows - begin, true);
      leave();
      for (int row = begin + kDepth; row < end; row += kDepth) {
        const int stage = multiply(rows - row, false);
        wgmma_wait<1>();
        ring.release(held);
        held = stage;
      }
      wgmma_wait<0>();
      keep_registers(acc);
      if (rows > 0) ring.release(held);
#pragma unroll
      for (int i = 0; i < Tile::kValues; ++i) done[i] = rows > 0 ? acc[i] : 0.0f;
      any = true, first_of_tile = begin == 0, last_of_tile = end == rows;
      begin = end;
    } while (begin < rows);
  }
  leave();
}

void launch(const Context& ctx, const CUtensorMap& dy_map, const CUtensorMap& x_map,
            const CUtensorMap& d_map, const WeightGradient& x, std::int64_t chain_rows,
            bool accumulate, bool heads) {
  const auto kernel = accumulate ? bf16_wgrad_kernel<true> : bf16_wgrad_kernel<false>;
  allow_shared_memory(kernel, Tile::kAllShared);
  const auto blocks = static_cast<unsigned>(std::min(Tile::count(x), kMultiprocessors));
  kernel<<<blocks, Tile::kThreads, Tile::kAllShared, stream_of(ctx)>>>(
      dy_map, x_map, d_map, x, static_cast<int>(chain_rows), heads);
  LOCKSTEP_CUDA_LAUNCHED("bf16_weight_gradient");
}

// [rows, pieces, columns], boxes of 64 columns of one piece.
CUtensorMap operand_map(const Bf16* data, std::int64_t columns, std::int64_t pieces,
                        std::int64_t piece_stride, std::int64_t rows, std::int64_t row_stride) {
  return tensor_map(data, DType::kBf16,
                    {{columns, 2, 64},
                     {pieces, piece_stride * 2, 1},
                     {std::max<std::int64_t>(rows, 1), row_stride * 2, kDepth}},
                    CU_TENSOR_MAP_SWIZZLE_128B, "bf16_weight_gradient");
}

bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

}  // namespace

void bf16_weight_gradient(const Context& ctx, const TensorView& dy_MN, const TensorView& x_MK,
                          const TensorView& offsets_E1, bool accumulate, const TensorView& d_ENK,
                          std::int64_t chain_rows) {
  const std::int64_t M = dy_MN.dim(0), E = d_ENK.dim(0), N = d_ENK.dim(1), K = d_ENK.dim(2);
  if (E == 0 || N == 0 || K == 0) return;
  const std::int32_t* offsets = offsets_E1 ? offsets_E1.as<std::int32_t>() : nullptr;
  const bool rows_at_16_bytes = K % 8 == 0 && N % 8 == 0 && M > 0 && aligned(dy_MN.data) &&
                                aligned(x_MK.data) && aligned(d_ENK.data);
  if (!rows_at_16_bytes)
    return plain_gemm(ctx, {dy_MN.as<Bf16>(), 1, N, x_MK.as<Bf16>(), 1, K, d_ENK.data, true,
                            accumulate, offsets, true, E, N, K, M, chain_rows});
  const WeightGradient x{offsets,
                         nullptr,
                         d_ENK.as<float>(),
                         static_cast<int>(E),
                         static_cast<int>(M),
                         static_cast<int>(N),
                         static_cast<int>(K)};
  launch(ctx, operand_map(dy_MN.as<Bf16>(), N, 1, N, M, N),
         operand_map(x_MK.as<Bf16>(), K, 1, K, M, K), wgrad_output_map(x), x, chain_rows,
         accumulate, false);
}

void head_weight_gradient(const Context& ctx, const Columns& y, const Columns& x, bool accumulate,
                          const HeadRows& d) {
  const std::int64_t T = y.slab_TN.dim(0), H = d.w_HNL.dim(0), R = d.w_HNL.dim(1), N = d.rows,
                     L = d.w_HNL.dim(2);
  if (H == 0 || N == 0 || L == 0) return;
  require_chunks(y, "head_weight_gradient: y");
  require_chunks(x, "head_weight_gradient: x");
  LOCKSTEP_CHECK(N % 8 == 0 && L % 8 == 0, "head_weight_gradient: rows {} and width {}", N, L);
  float* to = d.w_HNL.as<float>() + d.row * L;
  const WeightGradient all{nullptr,
                           nullptr,
                           to,
                           static_cast<int>(H),
                           static_cast<int>(T),
                           static_cast<int>(N),
                           static_cast<int>(L)};
  const auto map = [&](const Columns& z, std::int64_t width) {
    return operand_map(z.slab_TN.as<Bf16>() + z.column, width, H, H > 1 ? z.stride : width, T,
                       z.slab_TN.dim(1));
  };
  const CUtensorMap d_map =
      tensor_map(to, DType::kFp32,
                 {{L, 4, kStoreBoxColumns<float>}, {N, L * 4, kStoreBoxRows}, {H, R * L * 4, 1}},
                 CU_TENSOR_MAP_SWIZZLE_128B, "head_weight_gradient: d");
  launch(ctx, map(y, N), map(x, L), d_map, all, std::max<std::int64_t>(T, 1), accumulate, true);
}

}  // namespace lockstep::ops::cuda

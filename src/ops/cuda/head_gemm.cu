// Products of all heads in one persistent launch: like gemm_bf16_kernel.cuh, with the heads as a
// dimension of every map. A tile is 128 tokens by kColumns columns of one head.
#include <algorithm>

#include "ops/cuda/gemm_bf16_kernel.cuh"
#include "ops/cuda/head_gemm.h"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/tensor_map.h"

namespace lockstep::ops::cuda {
namespace {

using numerics::Bf16;
using tensor::DType;

struct HeadProduct {
  int heads, T, N, K;
};

template <int kColumnsOfTile, bool kWeightsMnMajor>
struct HeadTile {
  static constexpr int kRows = 128, kColumns = kColumnsOfTile, kDepth = 64;
  static constexpr Major kWeights = kWeightsMnMajor ? Major::kMn : Major::kK;
  static constexpr int kRowBytes = kRows * 128;
  static constexpr int kStageBytes = kRowBytes + kColumns * 128;
  static constexpr int kStages = 192 * 1024 / kStageBytes;
  static constexpr int kBoxes = 2;
  static constexpr int kBoxBytes = kBoxes * kStoreBoxBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + kRingSlack + 2 * kBoxBytes;
  static constexpr int kThreads = 384;

  __host__ __device__ static int count(const HeadProduct& x) {
    return x.heads * ((x.T + kRows - 1) / kRows) * ((x.N + kColumns - 1) / kColumns);
  }
};

// Head by head: a head's weight is read once from memory.
struct HeadPlace {
  int head, row, column;
};
template <typename Tile>
__device__ HeadPlace head_place(const HeadProduct& x, int tile) {
  const int column_tiles = (x.N + Tile::kColumns - 1) / Tile::kColumns;
  const int row_tiles = (x.T + Tile::kRows - 1) / Tile::kRows;
  const int rest = tile / column_tiles;
  return {rest / row_tiles, rest % row_tiles * Tile::kRows, tile % column_tiles * Tile::kColumns};
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    head_gemm_kernel(const __grid_constant__ CUtensorMap a_map,
                     const __grid_constant__ CUtensorMap b_map,
                     const __grid_constant__ CUtensorMap d_map, const HeadProduct x) {
  extern __shared__ unsigned char shared[];
  const StageRing<Tile::kStages, Tile::kStageBytes> ring(shared);
  ring.init(8);
  const int warpgroup = warpgroup_index();
  const int depth_tiles = (x.K + Tile::kDepth - 1) / Tile::kDepth, tiles = Tile::count(x);
  RingPosition<Tile::kStages> at;

  if (warpgroup == 2) {
    give_registers<40>();
    if (threadIdx.x / 32 != 8 || !elect_one()) return;
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles;
         tile += static_cast<int>(gridDim.x)) {
      const HeadPlace place = head_place<Tile>(x, tile);
      for (int t = 0; t < depth_tiles; ++t, at.advance()) {
        const std::uint32_t barrier = ring.start_fill(at, Tile::kStageBytes), to = ring.stage(at);
        tma_load_3d(to, &a_map, barrier, t * Tile::kDepth, place.head, place.row);
        load_weights<Tile::kWeights, Tile::kColumns>(to + Tile::kRowBytes, &b_map, barrier,
                                                     t * Tile::kDepth, place.column, place.head);
      }
    }
    return;
  }

  take_registers<232>();
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
    const HeadPlace place = head_place<Tile>(x, tile);
    float acc[Tile::kColumns / 2];
#pragma unroll
    for (float& c : acc) c = 0.0f;
    for (int t = 0; t < depth_tiles; ++t, at.advance()) {
      ring.wait_full(at);
      const std::uint32_t rows = ring.stage(at), columns = rows + Tile::kRowBytes;
      keep_registers(acc);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < Tile::kDepth / 16; ++step)
        wgmma_bf16<Major::kK, Tile::kWeights>(acc,
                                              bf16_operand<Major::kK>(rows, warpgroup * 64, step),
                                              bf16_operand<Tile::kWeights>(columns, 0, step), true);
      wgmma_commit();
      keep_registers(acc);
      wgmma_wait<1>();
      if (t > 0) ring.release_before(at);
    }
    wgmma_wait<0>();
    keep_registers(acc);
    if (depth_tiles > 0) ring.release_before(at);
    store_through_boxes<Bf16, Tile::kBoxes, 1>(
        &d_map, ring.end() + static_cast<std::uint32_t>(warpgroup * Tile::kBoxBytes), 1 + warpgroup,
        place.column, place.row + warpgroup * 64, place.head, acc);
  }
  finish_stores();
}

template <typename Tile>
void launch(const Context& ctx, const Columns& a, const HeadRows& b, const Columns& d,
            const HeadProduct& x) {
  constexpr auto kSwizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  const std::int64_t R = b.w_HNL.dim(1), L = b.w_HNL.dim(2), H = x.heads;
  const std::int64_t depth = std::max(x.K, 1);
  const auto stride = [&](const Columns& z, std::int64_t width) {
    return (H > 1 ? z.stride : width) * 2;
  };
  const CUtensorMap a_map = tensor_map(a.slab_TN.as<Bf16>() + a.column, DType::kBf16,
                                       {{depth, 2, Tile::kDepth},
                                        {H, stride(a, depth), 1},
                                        {x.T, a.slab_TN.dim(1) * 2, Tile::kRows}},
                                       kSwizzle, "head_gemm: a");
  const Bf16* w = b.w_HNL.as<Bf16>() + b.row * L;
  const bool nk = Tile::kWeights == Major::kK;
  const CUtensorMap b_map = tensor_map(
      w, DType::kBf16, {{L, 2, 64}, {b.rows, L * 2, nk ? Tile::kColumns : 64}, {H, R * L * 2, 1}},
      kSwizzle, "head_gemm: b");
  const CUtensorMap d_map = tensor_map(d.slab_TN.as<Bf16>() + d.column, DType::kBf16,
                                       {{x.N, 2, kStoreBoxColumns<Bf16>},
                                        {x.T, d.slab_TN.dim(1) * 2, kStoreBoxRows},
                                        {H, stride(d, x.N), 1}},
                                       kSwizzle, "head_gemm: d");
  const auto kernel = head_gemm_kernel<Tile>;
  allow_shared_memory(kernel, Tile::kSharedBytes);
  const auto blocks = static_cast<unsigned>(std::min(Tile::count(x), kMultiprocessors));
  kernel<<<blocks, Tile::kThreads, Tile::kSharedBytes, stream_of(ctx)>>>(a_map, b_map, d_map, x);
  LOCKSTEP_CUDA_LAUNCHED("head_gemm");
}

}  // namespace

void require_chunks(const Columns& x, const char* name) {
  const bool fits = reinterpret_cast<std::uintptr_t>(x.slab_TN.data) % 16 == 0 &&
                    x.slab_TN.dim(1) % 8 == 0 && x.column % 8 == 0 && x.stride % 8 == 0;
  LOCKSTEP_CHECK(fits, "{}: on a GPU rows of {}, column {} and stride {} must be multiples of 8",
                 name, x.slab_TN.dim(1), x.column, x.stride);
}

void head_gemm(const Context& ctx, const Columns& a, const HeadRows& b, BLayout layout,
               const Columns& d) {
  const std::int64_t T = a.slab_TN.dim(0), H = b.w_HNL.dim(0), L = b.w_HNL.dim(2);
  const bool nk = layout == BLayout::kNK;
  const HeadProduct x{static_cast<int>(H), static_cast<int>(T), static_cast<int>(nk ? b.rows : L),
                      static_cast<int>(nk ? L : b.rows)};
  if (H == 0 || T == 0 || x.N == 0) return;
  LOCKSTEP_CHECK(x.K > 0 && x.K % 8 == 0 && x.N % 8 == 0,
                 "head_gemm: on a GPU widths {} and {} must be multiples of 8", x.K, x.N);
  require_chunks(a, "head_gemm: a");
  require_chunks(d, "head_gemm: d");
  if (x.N <= 128)
    return nk ? launch<HeadTile<128, false>>(ctx, a, b, d, x)
              : launch<HeadTile<128, true>>(ctx, a, b, d, x);
  nk ? launch<HeadTile<256, false>>(ctx, a, b, d, x) : launch<HeadTile<256, true>>(ctx, a, b, d, x);
}

}  // namespace lockstep::ops::cuda

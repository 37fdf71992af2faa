#include "ops/cpu/head_gemm.h"

#include "ops/cpu/chain.h"
#include "ops/cpu/gemm_tiles.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {
namespace {

using numerics::Bf16;

constexpr int kTileColumns = 64;

// A head's columns with the tokens as rows, or as the contraction.
StridedBf16 head_rows(const Columns& x, std::int64_t h) {
  return {static_cast<const Bf16*>(x.slab_TN.data) + x.column + h * x.stride, x.slab_TN.dim(1), 1};
}
StridedBf16 head_columns(const Columns& x, std::int64_t h) {
  const StridedBf16 rows = head_rows(x, h);
  return {rows.data, 1, rows.row_stride};
}

// One tile's chain over K values into d, at element `at`.
void run_tile(const StridedBf16& a, const StridedBf16& b, std::int64_t K, const Tile& tile,
              const TensorView& d, std::int64_t at, std::int64_t d_stride, bool accumulate) {
  alignas(64) float c[Tiling::kTileRows * kTileColumns];
  for (int i = 0; i < tile.rows * kTileColumns; ++i) c[i] = 0.0f;
  bf16_chain({a.data + tile.row * a.row_stride, a.row_stride, a.k_stride},
             {b.data + tile.column * b.row_stride, b.row_stride, b.k_stride}, c, kTileColumns,
             tile.rows, tile.columns, K);
  write_tile(d, at + tile.row * d_stride + tile.column, d_stride, c, kTileColumns, tile.rows,
             tile.columns, accumulate);
}

}  // namespace

void head_gemm(const Context& ctx, const Columns& a, const HeadRows& b, BLayout layout,
               const Columns& d) {
  const std::int64_t T = a.slab_TN.dim(0), H = b.w_HNL.dim(0), R = b.w_HNL.dim(1),
                     L = b.w_HNL.dim(2);
  const bool nk = layout == BLayout::kNK;
  const std::int64_t N = nk ? b.rows : L, K = nk ? L : b.rows, d_stride = d.slab_TN.dim(1);
  const Tiling tiling{nullptr, H, T, N, kTileColumns};
  const std::int64_t tiles = tiling.count();
  [[maybe_unused]] const int threads = threads_for(ctx, T, H, N, K);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (std::int64_t i = 0; i < tiles; ++i) {
    const Tile tile = tiling.at(i);
    const std::int64_t h = tile.expert;
    const Bf16* w = static_cast<const Bf16*>(b.w_HNL.data) + (h * R + b.row) * L;
    run_tile(head_rows(a, h), nk ? StridedBf16{w, L, 1} : StridedBf16{w, 1, L}, K, tile, d.slab_TN,
             d.column + h * d.stride, d_stride, false);
  }
}

void head_weight_gradient(const Context& ctx, const Columns& y, const Columns& x, bool accumulate,
                          const HeadRows& d) {
  const std::int64_t T = y.slab_TN.dim(0), H = d.w_HNL.dim(0), R = d.w_HNL.dim(1),
                     L = d.w_HNL.dim(2);
  const Tiling tiling{nullptr, H, d.rows, L, kTileColumns};
  const std::int64_t tiles = tiling.count();
  [[maybe_unused]] const int threads = threads_for(ctx, T, H, d.rows, L);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (std::int64_t i = 0; i < tiles; ++i) {
    const Tile tile = tiling.at(i);
    const std::int64_t h = tile.expert;
    run_tile(head_columns(y, h), head_columns(x, h), T, tile, d.w_HNL, (h * R + d.row) * L, L,
             accumulate);
  }
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA

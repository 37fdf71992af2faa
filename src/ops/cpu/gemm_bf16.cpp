#include <algorithm>

#include "ops/cpu/chain.h"
#include "ops/cpu/gemm.h"
#include "ops/cpu/gemm_tiles.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {
namespace {

using numerics::Bf16;

constexpr int kTileColumns = 64;

// One expert's chain over K values into a tile of `d`.
void run_tile(const StridedBf16& a, const StridedBf16& b, std::int64_t K, const Tile& tile,
              const TensorView& d, std::int64_t at, std::int64_t d_stride, bool accumulate) {
  alignas(64) float c[Tiling::kTileRows * kTileColumns];
  for (int i = 0; i < tile.rows * kTileColumns; ++i) c[i] = 0.0f;
  bf16_chain({a.data + tile.row * a.row_stride, a.row_stride, a.k_stride},
             {b.data + tile.column * b.row_stride, b.row_stride, b.k_stride}, c, kTileColumns,
             tile.rows, tile.columns, K);
  write_tile(d, at, d_stride, c, kTileColumns, tile.rows, tile.columns, accumulate);
}

}  // namespace

void bf16_gemm(const Context& ctx, const TensorView& a_MK, const TensorView& b, BLayout layout,
               const TensorView& offsets_E1, const TensorView& d_MN) {
  const Bf16* a = a_MK.as<Bf16>();
  const Bf16* weights = b.as<Bf16>();
  const std::int64_t M = a_MK.dim(0), K = a_MK.dim(1), N = d_MN.dim(1);
  const Tiling tiling{offsets_E1 ? offsets_E1.as<std::int32_t>() : nullptr, b.dim(0), M, N,
                      kTileColumns};
  const std::int64_t tiles = tiling.count();
  [[maybe_unused]] const int threads = threads_for(ctx, M, b.dim(0), N, K);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (std::int64_t t = 0; t < tiles; ++t) {
    const Tile tile = tiling.at(t);
    const std::int64_t row = tiling.first_row(tile.expert);
    const Bf16* w = weights + tile.expert * N * K;
    const StridedBf16 columns =
        layout == BLayout::kNK ? StridedBf16{w, K, 1} : StridedBf16{w, 1, N};
    run_tile({a + row * K, K, 1}, columns, K, tile, d_MN, (row + tile.row) * N + tile.column, N,
             false);
  }
}

void bf16_weight_gradient(const Context& ctx, const TensorView& dy_MN, const TensorView& x_MK,
                          const TensorView& offsets_E1, bool accumulate, const TensorView& d_ENK,
                          std::int64_t chain_rows) {
  const Bf16* dy = dy_MN.as<Bf16>();
  const Bf16* x = x_MK.as<Bf16>();
  const std::int64_t M = dy_MN.dim(0), E = d_ENK.dim(0), N = d_ENK.dim(1), K = d_ENK.dim(2);
  const std::int32_t* offsets = offsets_E1 ? offsets_E1.as<std::int32_t>() : nullptr;
  const Tiling tiling{nullptr, E, N, K, kTileColumns};
  const std::int64_t tiles = tiling.count();
  [[maybe_unused]] const int threads = threads_for(ctx, M, E, N, K);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (std::int64_t t = 0; t < tiles; ++t) {
    const Tile tile = tiling.at(t);
    const std::int64_t first = offsets == nullptr ? 0 : offsets[tile.expert];
    const std::int64_t last = offsets == nullptr ? M : offsets[tile.expert + 1];
    std::int64_t begin = first;
    do {
      run_tile({dy + begin * N, 1, N}, {x + begin * K, 1, K}, std::min(chain_rows, last - begin),
               tile, d_ENK, (tile.expert * N + tile.row) * K + tile.column, K,
               accumulate || begin > first);
      begin += chain_rows;
    } while (begin < last);
  }
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA

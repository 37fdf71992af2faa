// What the GEMMs share: how the outputs of all experts are cut into tiles, and how a finished tile
// is written. Internal to ops/cpu.
#pragma once

#include <limits>

#include "ops/cpu/isa.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Rows [row, row + rows) and columns [column, column + columns) of one expert's output; rows count
// from the expert's first.
struct Tile {
  std::int64_t expert, row, column;
  int rows, columns;
};

// Tiles of at most kTileRows x `width`. Expert e has the rows offsets[e] .. offsets[e+1], or
// `all_rows` where offsets is null.
struct Tiling {
  static constexpr int kTileRows = 256;
  const std::int32_t* offsets;
  std::int64_t experts, all_rows, columns;
  int width;

  std::int64_t rows_of(std::int64_t e) const {
    return offsets == nullptr ? all_rows : offsets[e + 1] - offsets[e];
  }
  std::int64_t first_row(std::int64_t e) const { return offsets == nullptr ? 0 : offsets[e]; }
  std::int64_t count() const {
    std::int64_t row_tiles = 0;
    for (std::int64_t e = 0; e < experts; ++e) row_tiles += ceil_div(rows_of(e), kTileRows);
    return row_tiles * ceil_div(columns, width);
  }
  Tile at(std::int64_t index) const {
    const std::int64_t across = ceil_div(columns, width);
    std::int64_t row_tile = index / across, e = 0;
    for (; row_tile >= ceil_div(rows_of(e), kTileRows); ++e)
      row_tile -= ceil_div(rows_of(e), kTileRows);
    const std::int64_t row = row_tile * kTileRows, column = index % across * width;
    const std::int64_t rows = rows_of(e) - row, left = columns - column;
    return {e, row, column, static_cast<int>(rows < kTileRows ? rows : kTileRows),
            static_cast<int>(left < width ? left : width)};
  }
};

// Threads worth waking for M rows spread over E experts with b of [N, K] each; unpacking b costs as
// much as some rows do.
inline int threads_for(const tensor::Context& ctx, std::int64_t M, std::int64_t E, std::int64_t N,
                       std::int64_t K) {
  constexpr std::int64_t kUnpackRows = 8, kWorthThreads = std::int64_t{1} << 20;
  return (M + kUnpackRows * (E < M ? E : M)) * N * K < kWorthThreads ? 1 : ctx.threads;
}

// Writes `rows` rows of a tile at d (element `at`, row stride `stride`): BF16 or FP32; accumulate
// adds to FP32. A NaN gets the same bits everywhere.
inline void write_tile(const tensor::TensorView& d, std::int64_t at, std::int64_t stride,
                       const float* tile, std::int64_t tile_stride, int rows, int columns,
                       bool accumulate) {
  for (int m = 0; m < rows; ++m) {
    const float* from = tile + m * tile_stride;
    if (d.dtype == tensor::DType::kBf16) {
      numerics::Bf16* to = static_cast<numerics::Bf16*>(d.data) + at + m * stride;
      for (int n = 0; n < columns; ++n) to[n] = numerics::to_bf16(from[n]);
    } else {
      float* to = static_cast<float*>(d.data) + at + m * stride;
      for (int n = 0; n < columns; ++n) {
        const float x = accumulate ? to[n] + from[n] : from[n];
        to[n] = numerics::is_nan(x) ? std::numeric_limits<float>::quiet_NaN() : x;
      }
    }
  }
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA

// What the weight gradients share: a tile of 128 rows and 128 columns of one expert's d[n, k], two
// warpgroups of 64 rows each, and how it is added to d. d's old values are asked for before the
// tile is computed and used after it.
#pragma once

#include "ops/cuda/gemm_ring.cuh"
#include "ops/cuda/wgmma.cuh"

namespace lockstep::ops::cuda {

struct WeightGradient {
  const std::int32_t *offsets_E1, *padded_offsets_E1;  // offsets null: one group of M rows
  float* d_ENK;
  int experts, M, N, K;
};

inline constexpr int kWgradTile = 128;
inline constexpr int kWgradThreads = 384;

struct WgradPlace {
  int expert, row, column;  // of d
};
// Tiles expert by expert, in bands of 1024 rows, so that tiles at work at one time share operands.
__device__ __forceinline__ WgradPlace wgrad_place(const WeightGradient& x, int tile) {
  constexpr int kBand = 1024 / kWgradTile;
  const int row_tiles = (x.N + kWgradTile - 1) / kWgradTile;
  const int column_tiles = (x.K + kWgradTile - 1) / kWgradTile;
  const int expert = tile / (row_tiles * column_tiles);
  const int local = tile - expert * row_tiles * column_tiles;
  const int band = local / (kBand * column_tiles);
  const int height = min(kBand, row_tiles - band * kBand);
  const int rest = local - band * kBand * column_tiles;
  return {expert, (band * kBand + rest % height) * kWgradTile, rest / height * kWgradTile};
}
__host__ __device__ inline int wgrad_tiles(const WeightGradient& x) {
  return x.experts * ((x.N + kWgradTile - 1) / kWgradTile) * ((x.K + kWgradTile - 1) / kWgradTile);
}

// f(i, address) for the pairs i = 0..31 of this thread's 64 values that lie inside d: i = 2 j + h
// is registers 4 j + 2 h and the next one.
template <typename Function>
__device__ __forceinline__ void for_each_pair(const WeightGradient& x, const WgradPlace& place,
                                              Function f) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = place.row + thread / 32 * 16 + lane / 4 + 8 * h;
    const int column = place.column + 2 * (lane % 4);
    float* at = x.d_ENK + (static_cast<std::int64_t>(place.expert) * x.N + row) * x.K + column;
#pragma unroll
    for (int j = 0; j < kWgradTile / 8; ++j)
      if (row < x.N && column + 8 * j < x.K) f(2 * j + h, at + 8 * j);
  }
}

template <bool kAccumulate>
__device__ __forceinline__ void load_old(const WeightGradient& x, const WgradPlace& place,
                                         float2 (&old)[32]) {
  if constexpr (kAccumulate)
    for_each_pair(x, place, [&](int i, const float* from) {
      old[i] = __ldcs(reinterpret_cast<const float2*>(from));
    });
}
template <bool kAccumulate>
__device__ __forceinline__ void write_new(const WeightGradient& x, const WgradPlace& place,
                                          const float2 (&old)[32], const float (&acc)[64]) {
  for_each_pair(x, place, [&](int i, float* to) {
    float low = acc[2 * i], high = acc[2 * i + 1];
    if constexpr (kAccumulate) {
      low = old[i].x + low;
      high = old[i].y + high;
    }
    __stcs(reinterpret_cast<float2*>(to), make_float2(canonical(low), canonical(high)));
  });
}

}  // namespace lockstep::ops::cuda

// What the FP8 GEMM kernels share: arguments, a block of 128 in the tensor core, promotion.
#pragma once

#include "ops/cuda/gemm_tiles.cuh"
#include "ops/cuda/ptx.cuh"
#include "ops/cuda/wgmma.cuh"
#include "ops/operand.h"

namespace lockstep::ops::cuda {

struct GemmArguments {
  const float* a_scales;
  const float* b_scales;
  const std::int32_t* offsets;  // null: one expert
  void* d;
  int experts, M, N, K;
  int stages;
  bool bf16;
};

// The same in all lanes, and known to be.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x / 32), 0);
}

__device__ __forceinline__ float one_nan(float x) {
  return x == x ? x : __uint_as_float(0x7FC00000u);
}

// d = the part of a block: four steps of 32 from 0 (docs/numerics.md, section 4). a: 64 rows of 128
// bytes, b: N rows.
template <Fp8Type kA, Fp8Type kB, int kCount>
__device__ __forceinline__ void multiply_block(float (&d)[kCount], std::uint32_t a,
                                               std::uint32_t b) {
  const std::uint64_t operand_a = operand_128b(a), operand_b = operand_128b(b);
  keep_registers(d);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma_fp8<kA, kB>(d, operand_a + 2 * k, operand_b + 2 * k, k > 0);
  wgmma_commit();
  keep_registers(d);
  wgmma_wait<0>();
  keep_registers(d);
}

// This warp has read the stage. With clusters, every CTA that writes to it is told.
template <int kCluster>
__device__ __forceinline__ void release_stage(std::uint32_t empty, int lane) {
  if constexpr (kCluster > 1) {
    if (lane < kCluster) mbarrier_arrive_at(empty, static_cast<std::uint32_t>(lane));
  } else {
    if (lane == 0) mbarrier_arrive(empty);
  }
}

// Block scales of a thread's rows and columns, loaded one block ahead. A tile of 128 columns has
// one scale of b, one of 160, 192 or 256 (at multiples of its width) two.
template <int kWaves, int kColumns>
struct BlockScales {
  static constexpr int kGroups = kColumns == 128 ? 1 : 2;
  const float* a;  // of the block to load next
  const float* b[kGroups];
  int row[kWaves][2];
  int first_group;  // columns of the first group of b
  float a_now[kWaves][2], b_now[kGroups], a_next[kWaves][2], b_next[kGroups];

  __device__ __forceinline__ void start(const GemmArguments& x, int expert, int first_row,
                                        int wave_rows, int column) {
    const int column_blocks = (x.N + 127) / 128, blocks = (x.K + 127) / 128;
    a = x.a_scales;
    first_group = 128 - column % 128;
#pragma unroll
    for (int c = 0; c < kGroups; ++c) {
      const int block = column / 128 + c < column_blocks ? column / 128 + c : column_blocks - 1;
      b[c] = x.b_scales + (static_cast<std::int64_t>(expert) * column_blocks + block) * blocks;
    }
#pragma unroll
    for (int w = 0; w < kWaves; ++w)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = first_row + w * wave_rows + 8 * h;
        row[w][h] = r < x.M ? r : x.M - 1;
      }
    load(x);
  }
  __device__ __forceinline__ void load(const GemmArguments& x) {
#pragma unroll
    for (int w = 0; w < kWaves; ++w)
#pragma unroll
      for (int h = 0; h < 2; ++h) a_next[w][h] = __ldg(a + row[w][h]);
#pragma unroll
    for (int c = 0; c < kGroups; ++c) b_next[c] = __ldg(b[c]++);
    a += x.M;
  }
  // The loaded scales become those of now; `more`: load the next.
  __device__ __forceinline__ void next(const GemmArguments& x, bool more) {
#pragma unroll
    for (int w = 0; w < kWaves; ++w)
#pragma unroll
      for (int h = 0; h < 2; ++h) a_now[w][h] = a_next[w][h];
#pragma unroll
    for (int c = 0; c < kGroups; ++c) b_now[c] = b_next[c];
    if (more) load(x);
  }
  __device__ __forceinline__ void promote(int w, const float (&part)[kColumns / 2],
                                          float (&sum)[kColumns / 2]) const {
    float s[kGroups][2];
#pragma unroll
    for (int c = 0; c < kGroups; ++c)
#pragma unroll
      for (int h = 0; h < 2; ++h) s[c][h] = __fmul_rn(a_now[w][h], b_now[c]);
#pragma unroll
    for (int chunk = 0; chunk < kColumns / 32; ++chunk) {
      float s0 = s[0][0], s1 = s[0][1];
      if constexpr (kGroups > 1) {
        const bool second = 32 * chunk >= first_group;
        s0 = second ? s[kGroups - 1][0] : s0;
        s1 = second ? s[kGroups - 1][1] : s1;
      }
#pragma unroll
      for (int i = 16 * chunk; i < 16 * chunk + 16; ++i)
        sum[i] = __fmaf_rn(part[i], i % 4 < 2 ? s0 : s1, sum[i]);
    }
  }
};

// Row scaling, at the end: sum * (sa[m] * sb[n]). row, column: of the thread's first element.
template <int kColumns>
__device__ __forceinline__ void scale_rows(const GemmArguments& x, int expert, int row, int column,
                                           float (&sum)[kColumns / 2]) {
  const float* b = x.b_scales + static_cast<std::int64_t>(expert) * x.N;
  const float a0 = __ldg(x.a_scales + (row < x.M ? row : x.M - 1));
  const float a1 = __ldg(x.a_scales + (row + 8 < x.M ? row + 8 : x.M - 1));
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int n = column + 8 * j + c;
      const float s = __ldg(b + (n < x.N ? n : x.N - 1));
      sum[4 * j + c] = __fmul_rn(sum[4 * j + c], __fmul_rn(a0, s));
      sum[4 * j + 2 + c] = __fmul_rn(sum[4 * j + 2 + c], __fmul_rn(a1, s));
    }
}

}  // namespace lockstep::ops::cuda

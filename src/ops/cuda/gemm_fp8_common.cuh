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
  unsigned* tickets;  // ops/cuda/tickets.cuh
  int experts, M, N, K;
  int stages;
  bool bf16;
};

// The same in all lanes, and known to be.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x / 32), 0);
}

// Read once and kept, not read again in the inner loop.
__device__ __forceinline__ int lane_index() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

__device__ __forceinline__ float one_nan(float x) {
  return x == x ? x : __uint_as_float(0x7FC00000u);
}

// The low word of operand_128b(address), and the operand of a low word. Addresses inside an operand
// are sums of low words: few instructions lie between a full buffer and the multiplication.
__device__ __forceinline__ std::uint32_t operand_low(std::uint32_t address) {
  return static_cast<std::uint32_t>(operand_128b(address));
}
__device__ __forceinline__ std::uint64_t operand_of(std::uint32_t low) {
  return (operand_128b(0) >> 32 << 32) | low;
}

// d = the part of a block: four steps of 32 from 0 (docs/numerics.md, section 4). a: 64 rows of 128
// bytes, b: N rows, low words of operands. d is there after finish_block.
template <Fp8Type kA, Fp8Type kB, int kCount>
__device__ __forceinline__ void start_block(float (&d)[kCount], std::uint32_t a, std::uint32_t b) {
  keep_registers(d);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k)
    wgmma_fp8<kA, kB>(d, operand_of(a + 2 * k), operand_of(b + 2 * k), k > 0);
  wgmma_commit();
  keep_registers(d);
}
template <int kCount>
__device__ __forceinline__ void finish_block(float (&d)[kCount]) {
  wgmma_wait<0>();
  keep_registers(d);
}

// Every lane says that it has read the stage: one lane behind __syncwarp would do, but the compiler
// leaves that out in a converged warp, and racecheck then takes the next copy for a race.
inline constexpr int kReleases = 32;  // of a warp
__device__ __forceinline__ void release_stage(std::uint32_t empty) { mbarrier_arrive(empty); }

// Block scales travel through the ring beside the codes: [kRows] of A's rows, then one of B for
// each 128 of the tile's columns (two at most). One warp copies them; loads
// by the threads that use them would wait behind the codes of all stages.
template <int kRows>
struct ScaleStage {
  static constexpr int kBytes = 4 * (kRows + 4);

  // All lanes of the copying warp; `rows` is a multiple of 32, `column` the tile's first.
  __device__ static void copy(const GemmArguments& x, std::uint32_t to, int g, int row, int rows,
                              int expert, int column, int groups) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const float* a = x.a_scales + static_cast<std::int64_t>(g) * x.M;
#pragma unroll 1
    for (int i = lane; i < rows; i += 32)
      copy_async_4(to + 4 * i, a + (row + i < x.M ? row + i : x.M - 1));
    if (lane < groups) {
      const int column_blocks = (x.N + 127) / 128, blocks = (x.K + 127) / 128;
      const int block =
          column / 128 + lane < column_blocks ? column / 128 + lane : column_blocks - 1;
      copy_async_4(
          to + 4 * (kRows + lane),
          x.b_scales + static_cast<std::int64_t>(expert * column_blocks + block) * blocks + g);
    }
  }
};

// sum += part, each times its scale: s[h] for the rows + 8 h.
template <Scaling kScaling, int kCount>
__device__ __forceinline__ void promote(const float (&part)[kCount], const float (&s)[2],
                                        float (&sum)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (kScaling == Scaling::kBlock)
      sum[i] = __fmaf_rn(part[i], s[i / 2 % 2], sum[i]);
    else
      sum[i] = sum[i] + part[i];
  }
}

// Row scaling, at the end: sum * (sa[m] * sb[n]). row, column: of the thread's first element.
template <int kColumns>
__device__ __forceinline__ void scale_rows(const GemmArguments& x, int expert, int row, int column,
                                           float (&sum)[kColumns / 2]) {
  const float* b = x.b_scales + static_cast<std::int64_t>(expert) * x.N;
  asm volatile("" : "+l"(b));  // one address with offsets: as many addresses as columns would spill
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

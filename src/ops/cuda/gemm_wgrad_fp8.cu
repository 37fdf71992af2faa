// d[e, n, k] = sum over the rows m of segment e of dy[m, n] x[m, k], FP8 columns: blocks of 128
// rows of four wgmma steps each, promoted to FP32 with the scales of both operands (docs/
// numerics.md, section 6). Segments start at multiples of 128 and are filled up with zero codes, so
// blocks are whole.
#include <algorithm>

#include "ops/cuda/gemm_plain.h"
#include "ops/cuda/gemm_wgrad.cuh"
#include "ops/cuda/gemm_wgrad.h"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/tensor_map.h"

namespace lockstep::ops::cuda {
namespace {

using tensor::DType;

constexpr int kBlock = numerics::kQuantBlock;
static_assert(kBlock == 128);
constexpr int kOperandBytes = kWgradTile * kBlock;
constexpr int kScaleBytes = kWgradTile * 4;
// dy codes, x codes, dy scales, x scales.
constexpr int kStageBytes = 2 * kOperandBytes + 2 * kScaleBytes;
constexpr int kStages = 6;
constexpr int kShared = kStages * kStageBytes + kRingSlack;

struct Fp8Maps {
  CUtensorMap dy, x, dy_scales, x_scales;
};

__device__ __forceinline__ float load_shared(std::uint32_t from) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(from));
  return v;
}
__device__ __forceinline__ float2 load_shared_pair(std::uint32_t from) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from));
  return v;
}

// acc = fma(part, sdy * sx, acc), the scales of this block in shared memory.
__device__ __forceinline__ void promote_block(const float (&part)[64], std::uint32_t scales,
                                              float (&acc)[64]) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const std::uint32_t of_dy = scales + static_cast<std::uint32_t>(thread / 32 * 16 + lane / 4) * 4;
  const std::uint32_t of_x = scales + kScaleBytes + static_cast<std::uint32_t>(lane % 4) * 8;
  const float upper = load_shared(of_dy), lower = load_shared(of_dy + 32);
#pragma unroll
  for (int j = 0; j < kWgradTile / 8; ++j) {
    const float2 s = load_shared_pair(of_x + static_cast<std::uint32_t>(j) * 32);
    acc[4 * j] = numerics::fma(part[4 * j], upper * s.x, acc[4 * j]);
    acc[4 * j + 1] = numerics::fma(part[4 * j + 1], upper * s.y, acc[4 * j + 1]);
    acc[4 * j + 2] = numerics::fma(part[4 * j + 2], lower * s.x, acc[4 * j + 2]);
    acc[4 * j + 3] = numerics::fma(part[4 * j + 3], lower * s.y, acc[4 * j + 3]);
  }
}

// acc * (sdy[n] * sx[k]) of scales [E, N] and [E, K].
__device__ __forceinline__ void scale_rows(const WeightGradient& g, const WgradPlace& place,
                                           const float* dy_scales, const float* x_scales,
                                           float (&acc)[64]) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = place.row + thread / 32 * 16 + lane / 4 + 8 * h;
    if (row >= g.N) continue;
    const float of_dy = dy_scales[static_cast<std::int64_t>(place.expert) * g.N + row];
#pragma unroll
    for (int j = 0; j < kWgradTile / 8; ++j) {
      const int column = place.column + 2 * (lane % 4) + 8 * j;
      if (column >= g.K) continue;
      const float* of_x = x_scales + static_cast<std::int64_t>(place.expert) * g.K + column;
      acc[4 * j + 2 * h] *= of_dy * of_x[0];
      acc[4 * j + 2 * h + 1] *= of_dy * of_x[1];
    }
  }
}

template <Fp8Type kDy, Fp8Type kX, Scaling kScaling, bool kAccumulate>
__global__ void __launch_bounds__(kWgradThreads, 1)
    fp8_wgrad_kernel(const __grid_constant__ Fp8Maps maps, const WeightGradient g,
                     const float* dy_scales, const float* x_scales) {
  extern __shared__ unsigned char shared[];
  const Ring<kStages, kStageBytes> ring(shared);
  ring.init(8);
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  const int tiles = wgrad_tiles(g);
  RingPosition<kStages> at;
  const auto blocks_of = [&](int expert) {
    return (g.offsets_E1[expert + 1] - g.offsets_E1[expert] + kBlock - 1) / kBlock;
  };

  if (warpgroup == 2) {
    give_registers<40>();
    if (threadIdx.x / 32 != 8 || !elect_one()) return;
    constexpr int kBytes = kScaling == Scaling::kBlock ? kStageBytes : 2 * kOperandBytes;
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles;
         tile += static_cast<int>(gridDim.x)) {
      const WgradPlace place = wgrad_place(g, tile);
      const int first = g.padded_offsets_E1[place.expert], blocks = blocks_of(place.expert);
      for (int b = 0; b < blocks; ++b, at.advance()) {
        const std::uint32_t barrier = ring.start_fill(at, kBytes), to = ring.stage(at);
        const int token = first + b * kBlock;
        tma_load_2d(to, &maps.dy, barrier, token, place.row);
        tma_load_2d(to + kOperandBytes, &maps.x, barrier, token, place.column);
        if constexpr (kScaling == Scaling::kBlock) {
          tma_load_2d(to + 2 * kOperandBytes, &maps.dy_scales, barrier, place.row, token / kBlock);
          tma_load_2d(to + 2 * kOperandBytes + kScaleBytes, &maps.x_scales, barrier, place.column,
                      token / kBlock);
        }
      }
    }
    return;
  }

  take_registers<232>();
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
    const WgradPlace place = wgrad_place(g, tile);
    const int blocks = blocks_of(place.expert);
    float2 old[32];
    load_old<kAccumulate>(g, place, old);
    float acc[64], part[64];
#pragma unroll
    for (float& c : acc) c = 0.0f;
    for (int b = 0; b < blocks; ++b) {
      ring.wait_full(at);
      const std::uint32_t stage = ring.stage(at);
      const std::uint32_t dy = stage + static_cast<std::uint32_t>(warpgroup * 64 * kBlock);
      keep_registers(part);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kBlock / 32; ++step)
        wgmma_fp8<kDy, kX>(
            part, operand_128b(dy + static_cast<std::uint32_t>(step * 32)),
            operand_128b(stage + kOperandBytes + static_cast<std::uint32_t>(step * 32)), step > 0);
      wgmma_commit();
      keep_registers(part);
      wgmma_wait<0>();
      keep_registers(part);
      if constexpr (kScaling == Scaling::kBlock) {
        promote_block(part, stage + 2 * kOperandBytes, acc);
      } else {
#pragma unroll
        for (int i = 0; i < 64; ++i) acc[i] = acc[i] + part[i];
      }
      at.advance();
      ring.release_before(at);
    }
    if constexpr (kScaling == Scaling::kRow)
      if (blocks > 0) scale_rows(g, place, dy_scales, x_scales, acc);
    write_new<kAccumulate>(g, place, old, acc);
  }
}

struct Launch {
  const Context& ctx;
  const Fp8Columns &dy, &x;
  const WeightGradient& g;
  bool accumulate;
};

template <Fp8Type kDy, Fp8Type kX, Scaling kScaling, bool kAccumulate>
void launch(const Launch& l) {
  const std::int64_t R = l.dy.codes_NR.dim(1), blocks = (R + kBlock - 1) / kBlock;
  const auto codes = [&](const Fp8Columns& c, std::int64_t columns) {
    return tensor_map(c.codes_NR.data, DType::kE4m3, {{R, 1, kBlock}, {columns, R, kWgradTile}},
                      CU_TENSOR_MAP_SWIZZLE_128B, "fp8_weight_gradient codes");
  };
  const auto scales = [&](const Fp8Columns& c, std::int64_t columns) {
    return tensor_map(c.scales.data, DType::kFp32,
                      {{columns, 4, kWgradTile}, {blocks, columns * 4, 1}},
                      CU_TENSOR_MAP_SWIZZLE_NONE, "fp8_weight_gradient scales");
  };
  Fp8Maps maps{codes(l.dy, l.g.N), codes(l.x, l.g.K), {}, {}};
  if (kScaling == Scaling::kBlock) {
    maps.dy_scales = scales(l.dy, l.g.N);
    maps.x_scales = scales(l.x, l.g.K);
  }
  const auto kernel = fp8_wgrad_kernel<kDy, kX, kScaling, kAccumulate>;
  allow_shared_memory(kernel, kShared);
  const auto grid = static_cast<unsigned>(std::min(wgrad_tiles(l.g), kMultiprocessors));
  kernel<<<grid, kWgradThreads, kShared, stream_of(l.ctx)>>>(maps, l.g, l.dy.scales.as<float>(),
                                                             l.x.scales.as<float>());
  LOCKSTEP_CUDA_LAUNCHED("fp8_weight_gradient");
}

template <Fp8Type kDy, Fp8Type kX>
void launch_types(const Launch& l) {
  const bool block = l.dy.scaling == Scaling::kBlock;
  if (block && l.accumulate) return launch<kDy, kX, Scaling::kBlock, true>(l);
  if (block) return launch<kDy, kX, Scaling::kBlock, false>(l);
  if (l.accumulate) return launch<kDy, kX, Scaling::kRow, true>(l);
  launch<kDy, kX, Scaling::kRow, false>(l);
}

}  // namespace

void fp8_weight_gradient(const Context& ctx, const Fp8Columns& dy, const Fp8Columns& x,
                         const Segments& segments, bool accumulate, const TensorView& d_ENK) {
  const std::int64_t E = d_ENK.dim(0), N = d_ENK.dim(1), K = d_ENK.dim(2);
  const std::int64_t R = dy.codes_NR.dim(1);
  if (E == 0 || N == 0 || K == 0) return;
  if (R == 0)  // every segment is empty
    return plain_gemm(ctx, {nullptr, 0, 0, nullptr, 0, 0, d_ENK.data, true, accumulate, nullptr,
                            true, E, N, K, 0});
  LOCKSTEP_CHECK(R % 16 == 0 && N % 4 == 0 && K % 4 == 0,
                 "fp8_weight_gradient on a GPU: {} padded rows must be a multiple of 16, {} and {} "
                 "columns multiples of 4",
                 R, N, K);
  const WeightGradient g{segments.offsets_E1.as<std::int32_t>(),
                         segments.padded_offsets_E1.as<std::int32_t>(),
                         d_ENK.as<float>(),
                         static_cast<int>(E),
                         static_cast<int>(R),
                         static_cast<int>(N),
                         static_cast<int>(K)};
  const Launch l{ctx, dy, x, g, accumulate};
  const bool dy_e4m3 = dy.codes_NR.dtype == DType::kE4m3, x_e4m3 = x.codes_NR.dtype == DType::kE4m3;
  if (dy_e4m3 && x_e4m3) return launch_types<Fp8Type::kE4m3, Fp8Type::kE4m3>(l);
  if (dy_e4m3) return launch_types<Fp8Type::kE4m3, Fp8Type::kE5m2>(l);
  if (x_e4m3) return launch_types<Fp8Type::kE5m2, Fp8Type::kE4m3>(l);
  launch_types<Fp8Type::kE5m2, Fp8Type::kE5m2>(l);
}

}  // namespace lockstep::ops::cuda

// d[e, n, k] = sum over the rows m of segment e of dy[m, n] x[m, k], FP8 columns: blocks of 128
// rows of four wgmma steps each, promoted to FP32 with the scales of both operands (docs/
// numerics.md, section 6). Segments start at multiples of 128 and are filled up with zero codes, so
// blocks are whole.
#include <algorithm>
#include <type_traits>

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
// A stage: dy codes, x codes, dy scales, x scales.
struct Tile : WgradTile {
  static constexpr int kDyBytes = kRows * kBlock, kXBytes = kColumns * kBlock;
  static constexpr int kScales = kDyBytes + kXBytes, kXScales = kScales + 4 * kRows;
  static constexpr int kStageBytes = kXScales + 4 * kColumns;
  static constexpr int kStages = kStageMemory / kStageBytes;
  static constexpr int kAllShared = kStages * kStageBytes + kShared;
};

struct Fp8Maps {
  CUtensorMap d, dy, x, dy_scales, x_scales;
};

__device__ __forceinline__ float load_shared(std::uint32_t from) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(from));
  return v;
}

// acc = fma(part, sdy * sx, acc) with the scales of the part's block. Half of the scales are read
// before the part is waited for, the rest behind it: reads of shared memory are slow beside
// wgmma's.
struct Promotion {
  static constexpr int kHalf = Tile::kColumns / 16;  // of the pairs of x's scales
  std::uint32_t of_x;
  float upper, lower;
  float2 x[2][kHalf];

  __device__ __forceinline__ void load_half(int half) {
#pragma unroll
    for (int j = 0; j < kHalf; ++j)
      x[half][j] = take_pair(of_x + static_cast<std::uint32_t>((half * kHalf + j) * 32));
  }
  __device__ __forceinline__ explicit Promotion(std::uint32_t stage) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    const std::uint32_t of_dy =
        stage + Tile::kScales + static_cast<std::uint32_t>(thread / 32 * 16 + lane / 4) * 4;
    of_x = stage + Tile::kXScales + static_cast<std::uint32_t>(lane % 4) * 8;
    upper = load_shared(of_dy);
    lower = load_shared(of_dy + 32);
    load_half(0);
  }
  __device__ __forceinline__ void add(const float (&part)[Tile::kValues],
                                      float (&acc)[Tile::kValues]) const {
#pragma unroll
    for (int j = 0; j < 2 * kHalf; ++j) {
      const float2 s = x[j / kHalf][j % kHalf];
      acc[4 * j] = numerics::fma(part[4 * j], upper * s.x, acc[4 * j]);
      acc[4 * j + 1] = numerics::fma(part[4 * j + 1], upper * s.y, acc[4 * j + 1]);
      acc[4 * j + 2] = numerics::fma(part[4 * j + 2], lower * s.x, acc[4 * j + 2]);
      acc[4 * j + 3] = numerics::fma(part[4 * j + 3], lower * s.y, acc[4 * j + 3]);
    }
  }
};

// acc * (sdy[n] * sx[k]) of scales [E, N] and [E, K].
__device__ __forceinline__ void scale_rows(const WeightGradient& g, const WgradPlace& place,
                                           const float* dy_scales, const float* x_scales,
                                           float (&acc)[Tile::kValues]) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = place.row + thread / 32 * 16 + lane / 4 + 8 * h;
    if (row >= g.N) continue;
    const float of_dy = dy_scales[static_cast<std::int64_t>(place.expert) * g.N + row];
#pragma unroll
    for (int j = 0; j < Tile::kColumns / 8; ++j) {
      const int column = place.column + 2 * (lane % 4) + 8 * j;
      if (column >= g.K) continue;
      const float* of_x = x_scales + static_cast<std::int64_t>(place.expert) * g.K + column;
      acc[4 * j + 2 * h] *= of_dy * of_x[0];
      acc[4 * j + 2 * h + 1] *= of_dy * of_x[1];
    }
  }
}

template <Fp8Type kDy, Fp8Type kX, Scaling kScaling, bool kAccumulate>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    fp8_wgrad_kernel(const __grid_constant__ Fp8Maps maps, const WeightGradient g,
                     const float* dy_scales, const float* x_scales) {
  extern __shared__ unsigned char shared[];
  const StageRing<Tile::kStages, Tile::kStageBytes> ring(shared);
  if (threadIdx.x == 0) {
    for (int w = 0; w < Tile::kWarpgroups; ++w) WgradBoxes::of(ring, w).init();
  }
  ring.init(4 * Tile::kWarpgroups);
  const int warpgroup = warpgroup_index();
  const int tiles = Tile::count(g);
  RingPosition<Tile::kStages> at;
  const auto blocks_of = [&](int expert) {
    return (g.offsets_E1[expert + 1] - g.offsets_E1[expert] + kBlock - 1) / kBlock;
  };

  if (warpgroup == Tile::kWarpgroups) {
    give_registers<Tile::kOtherRegisters>();
    const int warp = static_cast<int>(threadIdx.x) / 32 - 4 * Tile::kWarpgroups;
    if (!elect_one()) return;
    if (warp > Tile::kWarpgroups) return;
    if (warp > 0)
      return move_results<kAccumulate>(g, &maps.d, WgradBoxes::of(ring, warp - 1), warp - 1);
    constexpr int kCodeBytes = Tile::kDyBytes + Tile::kXBytes;
    constexpr int kBytes =
        kCodeBytes + (kScaling == Scaling::kBlock ? 4 * (Tile::kRows + Tile::kColumns) : 0);
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles;
         tile += static_cast<int>(gridDim.x)) {
      const WgradPlace place = Tile::place(g, tile);
      const int first = g.padded_offsets_E1[place.expert], blocks = blocks_of(place.expert);
      for (int b = 0; b < blocks; ++b, at.advance()) {
        const std::uint32_t barrier = ring.start_fill(at, kBytes), to = ring.stage(at);
        const int token = first + b * kBlock;
        tma_load_2d(to, &maps.dy, barrier, token, place.row);
        tma_load_2d(to + Tile::kDyBytes, &maps.x, barrier, token, place.column);
        if constexpr (kScaling == Scaling::kBlock) {
          tma_load_2d(to + Tile::kScales, &maps.dy_scales, barrier, place.row, token / kBlock);
          tma_load_2d(to + Tile::kXScales, &maps.x_scales, barrier, place.column, token / kBlock);
        }
      }
    }
    return;
  }

  take_registers<Tile::kRegisters>();
  const WgradBoxes boxes = WgradBoxes::of(ring, warpgroup);
  std::uint32_t parity = 0;
  float acc[Tile::kValues], part[Tile::kValues], other[Tile::kValues];
  const std::uint32_t my_rows = static_cast<std::uint32_t>(warpgroup * 64 * kBlock);
  // Starts the product of the next block; returns its stage.
  const auto multiply = [&](float(&into)[Tile::kValues]) {
    const int stage = at.stage;
    ring.wait_full(at);
    at.advance();
    const std::uint64_t dy = operand_128b(ring.stage(stage) + my_rows);
    const std::uint64_t x = operand_128b(ring.stage(stage) + Tile::kDyBytes);
    keep_registers(into);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma_fp8<kDy, kX>(into, dy + 2 * k, x + 2 * k, k > 0);
    wgmma_commit();
    keep_registers(into);
    return stage;
  };
  // Waits until at most kPending later products are under way, and adds this one.
  const auto add = [&]<int kPending>(std::integral_constant<int, kPending>,
                                     float(&from)[Tile::kValues], int stage) {
    if constexpr (kScaling == Scaling::kBlock) {
      Promotion promotion(ring.stage(stage));
      wgmma_wait<kPending>();
      keep_registers(from);
      promotion.load_half(1);
      ring.release(stage);
      promotion.add(from, acc);
    } else {
      wgmma_wait<kPending>();
      keep_registers(from);
      ring.release(stage);
#pragma unroll
      for (int i = 0; i < Tile::kValues; ++i) acc[i] = acc[i] + from[i];
    }
    keep_registers(acc);
  };
  int expert = -1, blocks = 0;
  constexpr std::integral_constant<int, 0> kLast{};
  constexpr std::integral_constant<int, 1> kOneBehind{};
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles;
       tile += static_cast<int>(gridDim.x), parity ^= 1) {
    const WgradPlace place = Tile::place(g, tile);
    // An expert's tiles follow each other: its rows are looked up once.
    if (place.expert != expert) blocks = blocks_of(place.expert);
    expert = place.expert;
#pragma unroll
    for (float& c : acc) c = 0.0f;
    // The tensor cores have the next block's product while one is added. (Nothing is under way at
    // the end of a loop's body: the compiler would put everything in a row.)
    int b = 0;
    for (; b + 4 <= blocks; b += 4) {
      const int s0 = multiply(part), s1 = multiply(other);
      add(kOneBehind, part, s0);
      const int s2 = multiply(part);
      add(kOneBehind, other, s1);
      const int s3 = multiply(other);
      add(kOneBehind, part, s2);
      add(kLast, other, s3);
    }
    if (b + 2 <= blocks) {
      const int s0 = multiply(part), s1 = multiply(other);
      add(kOneBehind, part, s0);
      add(kLast, other, s1);
      b += 2;
    }
    if (b < blocks) {
      const int s0 = multiply(part);
      add(kLast, part, s0);
    }
    if constexpr (kScaling == Scaling::kRow)
      if (blocks > 0) scale_rows(g, place, dy_scales, x_scales, acc);
    mbarrier_wait(boxes.ready, parity);
    put_results<kAccumulate>(boxes, acc);
    give_boxes(boxes);
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
  const auto codes = [&](const Fp8Columns& c, std::int64_t columns, int box) {
    return tensor_map(c.codes_NR.data, DType::kE4m3, {{R, 1, kBlock}, {columns, R, box}},
                      CU_TENSOR_MAP_SWIZZLE_128B, "fp8_weight_gradient codes");
  };
  const auto scales = [&](const Fp8Columns& c, std::int64_t columns, int box) {
    return tensor_map(c.scales.data, DType::kFp32, {{columns, 4, box}, {blocks, columns * 4, 1}},
                      CU_TENSOR_MAP_SWIZZLE_NONE, "fp8_weight_gradient scales");
  };
  Fp8Maps maps{wgrad_output_map(l.g),
               codes(l.dy, l.g.N, Tile::kRows),
               codes(l.x, l.g.K, Tile::kColumns),
               {},
               {}};
  if (kScaling == Scaling::kBlock) {
    maps.dy_scales = scales(l.dy, l.g.N, Tile::kRows);
    maps.x_scales = scales(l.x, l.g.K, Tile::kColumns);
  }
  const auto kernel = fp8_wgrad_kernel<kDy, kX, kScaling, kAccumulate>;
  allow_shared_memory(kernel, Tile::kAllShared);
  const auto grid = static_cast<unsigned>(std::min(Tile::count(l.g), kMultiprocessors));
  kernel<<<grid, Tile::kThreads, Tile::kAllShared, stream_of(l.ctx)>>>(
      maps, l.g, l.dy.scales.as<float>(), l.x.scales.as<float>());
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
  constexpr Fp8Type kE4m3 = Fp8Type::kE4m3, kE5m2 = Fp8Type::kE5m2;
  const bool dy_e4m3 = dy.codes_NR.dtype == DType::kE4m3, x_e4m3 = x.codes_NR.dtype == DType::kE4m3;
  if (dy_e4m3 && x_e4m3) {
    return launch_types<kE4m3, kE4m3>(l);
  }
  if (dy_e4m3) return launch_types<kE4m3, kE5m2>(l);
  if (x_e4m3) return launch_types<kE5m2, kE4m3>(l);
  launch_types<kE5m2, kE5m2>(l);
}

}  // namespace lockstep::ops::cuda

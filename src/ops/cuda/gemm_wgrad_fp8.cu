// d[e, n, k] = sum over the rows m of segment e of dy[m, n] x[m, k], FP8 columns: blocks of 128
// rows of four wgmma steps each, promoted to FP32 with the scales of both operands (docs/
// numerics.md, section 6). Segments start at multiples of 128 and are filled up with zero codes, so
// blocks are whole.

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
// A stage: dy codes, x codes, dy scales, x scales in the order in which threads read them.
struct Tile : WgradTile {
  static constexpr int kDyBytes = kRows * kBlock, kXBytes = kColumns * kBlock;
  static constexpr int kScales = kDyBytes + kXBytes, kXScales = kScales + 4 * kRows;
  static constexpr int kStageBytes = kXScales + 4 * kColumns;
  static constexpr int kStages = kStageMemory / kStageBytes;
  static constexpr int kAllShared = kStages * kStageBytes + kShared;
  // What a CTA loads for its cluster.
  static constexpr int kDyPart = kRows / kClusterColumns, kXPart = kColumns / kClusterRows;
};
using Stages = StageRing<Tile::kStages, Tile::kStageBytes>;

struct Fp8Maps {
  CUtensorMap d, dy, x;
};

__device__ __forceinline__ int blocks_of(const WeightGradient& g, int expert) {
  return (g.offsets_E1[expert + 1] - g.offsets_E1[expert] + kBlock - 1) / kBlock;
}

// One thread fills the stages with codes.
__device__ void load_codes(const Fp8Maps& maps, const WeightGradient& g, const Stages& ring) {
  Stages::Position at;
  for (int tile = Tile::first(); tile < Tile::count(g); tile += Tile::stride()) {
    const WgradPlace place = Tile::place(g, tile);
    const int first = g.padded_offsets_E1[place.expert], blocks = blocks_of(g, place.expert);
    for (int b = 0; b < blocks; ++b, at.advance()) {
      const std::uint32_t full = ring.start_fill(at, Tile::kDyBytes + Tile::kXBytes);
      const int token = first + b * kBlock;
      load_for_row(ring.stage(at), &maps.dy, full, token, place.row, Tile::kDyPart);
      load_for_column(ring.stage(at) + Tile::kDyBytes, &maps.x, full, token, place.column,
                      Tile::kXPart);
    }
  }
}

// One warp fills the stages with scales. Those of x so that a thread of wgmma finds the four of two
// neighbouring pairs together: column 16 i + 8 j + 2 q + c lies at 16 i + 4 q + 2 j + c.
__device__ void load_scales(const WeightGradient& g, const float* dy_scales, const float* x_scales,
                            const Stages& ring) {
  Stages::Position at;
  const int lane = static_cast<int>(threadIdx.x) % 32, n = 2 * lane;
  const auto of_dy = static_cast<std::uint32_t>(Tile::kScales + 16 * lane);
  const auto of_x =
      static_cast<std::uint32_t>(Tile::kXScales + 4 * (n / 16 * 16 + n % 8 * 2 + n / 8 % 2 * 2));
  for (int tile = Tile::first(); tile < Tile::count(g); tile += Tile::stride()) {
    const WgradPlace place = Tile::place(g, tile);
    const int first = g.padded_offsets_E1[place.expert] / kBlock,
              blocks = blocks_of(g, place.expert);
    const int row = place.row + 4 * lane, column = place.column + n;
    for (int b = 0; b < blocks; ++b, at.advance()) {
      ring.wait_empty(at);
      const std::uint32_t to = ring.stage(at);
      const float* dy = dy_scales + static_cast<std::int64_t>(first + b) * g.N;
      const float* x = x_scales + static_cast<std::int64_t>(first + b) * g.K;
      if (row < g.N) copy_async_16(to + of_dy, dy + row);
      if (column < g.K) copy_async_8(to + of_x, x + column);
      if (column + 64 < g.K) copy_async_8(to + of_x + 4 * 64, x + column + 64);
      copies_arrive(ring.full(at.stage));
    }
  }
}

// A thread's scales of a block: rows lane / 4 and lane / 4 + 8 of its warp's 16, and columns.
struct BlockScales {
  float upper, lower;
  float x[Tile::kColumns / 4];

  __device__ __forceinline__ void load(std::uint32_t stage) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    const std::uint32_t of_dy =
        stage + Tile::kScales + static_cast<std::uint32_t>(thread / 32 * 16 + lane / 4) * 4;
    const std::uint32_t of_x = stage + Tile::kXScales + static_cast<std::uint32_t>(lane % 4) * 16;
    upper = load_shared_float(of_dy);
    lower = load_shared_float(of_dy + 32);
#pragma unroll
    for (int i = 0; i < Tile::kColumns / 16; ++i) {
      const uint4 four = load_shared_16(of_x + static_cast<std::uint32_t>(i * 64));
      x[4 * i] = __uint_as_float(four.x);
      x[4 * i + 1] = __uint_as_float(four.y);
      x[4 * i + 2] = __uint_as_float(four.z);
      x[4 * i + 3] = __uint_as_float(four.w);
    }
  }
  // s = sdy * sx for a thread's values.
  __device__ __forceinline__ void multiply(float (&s)[Tile::kValues]) const {
#pragma unroll
    for (int i = 0; i < Tile::kValues; ++i)
      s[i] = (i % 4 < 2 ? upper : lower) * x[i / 4 * 2 + i % 2];
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

// One of the warpgroups that multiply. Reads of shared memory wait for wgmmas that were issued
// before them, so a block's scales are read before its product is started; they are multiplied
// while it is under way.
template <Fp8Type kDy, Fp8Type kX, Scaling kScaling, bool kAccumulate>
__device__ __forceinline__ void multiply_tiles(const WeightGradient& g, const float* dy_scales,
                                               const float* x_scales, const Stages& ring,
                                               int warpgroup) {
  constexpr bool kScales = kScaling == Scaling::kBlock;
  const WgradBoxes boxes = WgradBoxes::of(ring, warpgroup);
  const auto my_rows = static_cast<std::uint32_t>(warpgroup * 64 * kBlock);
  const int tiles = Tile::count(g), stride = Tile::stride();
  std::uint32_t parity = 0;
  float acc[Tile::kValues], part[Tile::kValues], products[Tile::kValues];
  BlockScales scales;
  // The blocks of a tile; tiles of an expert follow each other.
  int expert = -1, expert_blocks = 0;
  const auto blocks_at = [&](int tile) {
    const int e = Tile::place(g, tile).expert;
    if (e != expert) expert_blocks = blocks_of(g, e);
    expert = e;
    return expert_blocks;
  };
  Stages::Position at;
  bool ready = false;  // the stage is full, its scales are read
  for (int tile = Tile::first(); tile < tiles; tile += stride) {
    const int blocks = blocks_at(tile);
#pragma unroll
    for (float& c : acc) c = 0.0f;
    for (int b = 0; b < blocks; ++b) {
      if (!ready) {
        ring.wait_full(at);
        if constexpr (kScales) scales.load(ring.stage(at));
      }
      const std::uint64_t dy = operand_128b(ring.stage(at) + my_rows);
      const std::uint64_t x = operand_128b(ring.stage(at) + Tile::kDyBytes);
      keep_registers(part);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma_fp8<kDy, kX>(part, dy + 2 * k, x + 2 * k, k > 0);
      wgmma_commit();
      keep_registers(part);
      if constexpr (kScales) {
        // Always true. The compiler would multiply behind the wait, where nothing hides it.
        if (g.experts > 0) {
          scales.multiply(products);
        } else {
#pragma unroll
          for (float& s : products) s = 0.0f;
        }
      }
      wgmma_wait<0>();
      keep_registers(part);
      release_to_friends(ring.empty(at.stage));
      at.advance();
      ready = b + 1 < blocks;
      if (ready) {
        ring.wait_full(at);
        if constexpr (kScales) scales.load(ring.stage(at));
      }
#pragma unroll
      for (int i = 0; i < Tile::kValues; ++i)
        acc[i] = kScales ? numerics::fma(part[i], products[i], acc[i]) : acc[i] + part[i];
      keep_registers(acc);
    }
    if constexpr (!kScales)
      if (blocks > 0) scale_rows(g, Tile::place(g, tile), dy_scales, x_scales, acc);
    give_results<kAccumulate>(boxes, parity, acc);
    parity ^= 1;
  }
}

template <Fp8Type kDy, Fp8Type kX, Scaling kScaling, bool kAccumulate>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    fp8_wgrad_kernel(const __grid_constant__ Fp8Maps maps, const WeightGradient g,
                     const float* dy_scales, const float* x_scales) {
  constexpr bool kScales = kScaling == Scaling::kBlock;
  extern __shared__ unsigned char shared[];
  const Stages ring(shared);
  start_wgrad(ring, kScales ? 1 + 32 : 1);  // the copy engine, and the lanes that copy scales
  const int warpgroup = warpgroup_index();

  if (warpgroup == Tile::kWarpgroups) {
    give_registers<Tile::kOtherRegisters>();
    const int warp = static_cast<int>(threadIdx.x) / 32 - 4 * Tile::kWarpgroups;
    if (warp == 0) {
      if (elect_one()) load_codes(maps, g, ring);
    } else if (warp == 1) {
      if constexpr (kScales) load_scales(g, dy_scales, x_scales, ring);
    } else if (elect_one()) {
      move_results<kAccumulate>(g, &maps.d, WgradBoxes::of(ring, warp - 2), warp - 2);
    }
  } else {
    take_registers<Tile::kRegisters>();
    multiply_tiles<kDy, kX, kScaling, kAccumulate>(g, dy_scales, x_scales, ring, warpgroup);
  }
  finish_wgrad();
}

struct Launch {
  const Context& ctx;
  const Fp8Columns &dy, &x;
  const WeightGradient& g;
  bool accumulate;
};

template <Fp8Type kDy, Fp8Type kX, Scaling kScaling, bool kAccumulate>
void launch(const Launch& l) {
  const std::int64_t R = l.dy.codes_NR.dim(1);
  const auto codes = [&](const Fp8Columns& c, std::int64_t columns, int box) {
    return tensor_map(c.codes_NR.data, DType::kE4m3, {{R, 1, kBlock}, {columns, R, box}},
                      CU_TENSOR_MAP_SWIZZLE_128B, "fp8_weight_gradient codes");
  };
  const Fp8Maps maps{wgrad_output_map(l.g), codes(l.dy, l.g.N, Tile::kDyPart),
                     codes(l.x, l.g.K, Tile::kXPart)};
  launch_wgrad(l.ctx, "fp8_weight_gradient", fp8_wgrad_kernel<kDy, kX, kScaling, kAccumulate>,
               Tile::kAllShared, l.g, maps, l.g, l.dy.scales.as<float>(), l.x.scales.as<float>());
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

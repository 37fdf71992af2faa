// FP8 weight gradient, tiles of 256 x 128.
#pragma once

#include "ops/cuda/gemm_ring.cuh"
#include "ops/cuda/gemm_store.cuh"
#include "ops/cuda/gemm_wgrad.cuh"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/tensor_map.h"
#include "ops/cuda/wgmma.cuh"

namespace lockstep::ops::cuda {

enum class Promote { kFull, kNone, kOneFma, kNoReads, kShared, kAhead };
struct WideVariant {
  int cluster = 1;
  int turn = 0;  // 0: no order; 4: pass after issue; 1..3: steps left when the turn is passed
  Promote promote = Promote::kFull;
  bool add_in_l2 = false;
  bool loads = true;
  bool hint = true;
  constexpr int code() const {
    return cluster | turn << 2 | static_cast<int>(promote) << 5 | add_in_l2 << 8 | loads << 9 | hint << 10;
  }
};
constexpr WideVariant variant_of(int code) {
  return {code & 3, code >> 2 & 7, static_cast<Promote>(code >> 5 & 7), (code >> 8 & 1) != 0,
          (code >> 9 & 1) != 0, (code >> 10 & 1) != 0};
}

// A stage: dy codes, x codes, dy scales, x scales (in the order in which threads read them).
struct Wide {
  static constexpr int kBlock = 128;
  static constexpr int kRows = 256, kColumns = 128, kHalfValues = 64;
  static constexpr int kThreads = 384, kRegisters = 240, kOtherRegisters = 24;
  static constexpr int kDyBytes = kRows * kBlock, kXBytes = kColumns * kBlock;
  static constexpr int kScales = kDyBytes + kXBytes, kXScales = kScales + 4 * kRows;
  static constexpr int kStageBytes = (kXScales + 4 * kColumns + 1023) / 1024 * 1024;
  static constexpr int kBoxes = 4;  // of a warpgroup: 64 rows x 128 columns
  static constexpr int kBoxBytes = kBoxes * kStoreBoxBytes;
  static constexpr int kShared = kRingSlack + 2 * kBoxBytes;
  static constexpr int kStages = (kSharedMemory - kShared) / kStageBytes;
  static constexpr int kAllShared = kStages * kStageBytes + kShared;
  static_assert(kStages >= 3);

  // In clusters neighbours have neighbouring columns: tiles are counted by clusters.
  __host__ __device__ static int count(const WeightGradient& x, int cluster) {
    const int columns = kColumns * cluster;
    return x.experts * ((x.N + kRows - 1) / kRows) * ((x.K + columns - 1) / columns);
  }
  __device__ static WgradPlace place(const WeightGradient& x, int tile, int cluster, int rank) {
    constexpr int kBand = 2048 / kRows;
    const int row_tiles = (x.N + kRows - 1) / kRows;
    const int columns = kColumns * cluster;
    const int column_tiles = (x.K + columns - 1) / columns;
    const int expert = tile / (row_tiles * column_tiles);
    const int local = tile - expert * row_tiles * column_tiles;
    const int band = local / (kBand * column_tiles);
    const int height = min(kBand, row_tiles - band * kBand);
    const int rest = local - band * kBand * column_tiles;
    return {expert, (band * kBand + rest % height) * kRows,
            rest / height * columns + rank * kColumns};
  }
};

struct WideMaps {
  CUtensorMap d, dy, x;
};

__device__ __forceinline__ void tma_store_3d_hint(const CUtensorMap* map, std::uint32_t from, int x,
                                                  int y, int z, L2Hint hint) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4}], "
      "[%1], %5;" ::"l"(map),
      "r"(from), "r"(x), "r"(y), "r"(z), "l"(hint)
      : "memory");
}

struct WideScales {
  std::uint32_t of_dy, of_x;
  float upper, lower;
  float4 x[8];
  __device__ __forceinline__ WideScales() {}
  __device__ __forceinline__ void set(std::uint32_t stage, int rows_before) {
    const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
    of_dy = stage + Wide::kScales +
            static_cast<std::uint32_t>(rows_before + thread / 32 * 16 + lane / 4) * 4;
    of_x = stage + Wide::kXScales + static_cast<std::uint32_t>(lane % 4) * 16;
  }
  __device__ __forceinline__ void load_rows() {
    upper = load_shared_float(of_dy);
    lower = load_shared_float(of_dy + 32);
  }
  __device__ __forceinline__ void load(int first, int last) {
#pragma unroll
    for (int i = first; i < last; ++i)
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(x[i].x), "=f"(x[i].y), "=f"(x[i].z), "=f"(x[i].w)
                   : "r"(of_x + static_cast<std::uint32_t>(i * 64))
                   : "memory");
  }
  // Products of the scales with the values of x's scales [8 i, 8 i + 8) in the order of D.
  __device__ __forceinline__ void multiply(int i, float (&m)[8]) const {
    const float s[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
    for (int v = 0; v < 8; ++v)
      asm volatile("mul.rn.f32 %0, %1, %2;"
                   : "=f"(m[v])
                   : "f"(v % 4 < 2 ? upper : lower), "f"(s[v / 4 * 2 + v % 2]));
  }
  template <Promote kPromote>
  __device__ __forceinline__ void add(const float (&part)[64], float (&acc)[64]) const {
    if constexpr (kPromote == Promote::kNone) {
      acc[0] = acc[0] + part[0];
    } else if constexpr (kPromote == Promote::kOneFma) {
#pragma unroll
      for (int i = 0; i < 64; ++i) acc[i] = numerics::fma(part[i], i % 4 < 2 ? upper : lower, acc[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float s0 = j == 0 ? x[i].x : x[i].z, s1 = j == 0 ? x[i].y : x[i].w;
          const int v = 8 * i + 4 * j;
          if constexpr (kPromote == Promote::kNoReads) {
            float m[4];
            asm volatile("mul.rn.f32 %0, %1, %2;" : "=f"(m[0]) : "f"(upper), "f"(s0));
            asm volatile("mul.rn.f32 %0, %1, %2;" : "=f"(m[1]) : "f"(upper), "f"(s1));
            asm volatile("mul.rn.f32 %0, %1, %2;" : "=f"(m[2]) : "f"(lower), "f"(s0));
            asm volatile("mul.rn.f32 %0, %1, %2;" : "=f"(m[3]) : "f"(lower), "f"(s1));
            for (int k = 0; k < 4; ++k) acc[v + k] = numerics::fma(part[v + k], m[k], acc[v + k]);
            continue;
          }
          acc[v] = numerics::fma(part[v], upper * s0, acc[v]);
          acc[v + 1] = numerics::fma(part[v + 1], upper * s1, acc[v + 1]);
          acc[v + 2] = numerics::fma(part[v + 2], lower * s0, acc[v + 2]);
          acc[v + 3] = numerics::fma(part[v + 3], lower * s1, acc[v + 3]);
        }
    }
  }
};

template <Fp8Type kDy, Fp8Type kX, bool kAccumulate, int kCode>
__global__ void __launch_bounds__(Wide::kThreads, 1)
    fp8_wide_kernel(const __grid_constant__ WideMaps maps, const WeightGradient g,
                    const float* dy_scales, const float* x_scales, long long* cycles) {
  extern __shared__ unsigned char shared[];
  constexpr int kCluster = variant_of(kCode).cluster;
  constexpr bool kOld = kAccumulate && !variant_of(kCode).add_in_l2;  // old values come through shared memory
  const long long begin = clock64();
  const StageRing<Wide::kStages, Wide::kStageBytes> ring(shared);
  const auto boxes_of = [&](int w) {
    return ring.end() + static_cast<std::uint32_t>(w * Wide::kBoxBytes);
  };
  const auto ready_of = [&](int w) { return ring.own_barrier(2 * w); };
  const auto done_of = [&](int w) { return ring.own_barrier(2 * w + 1); };
  // The ring's own barriers, with other counts.
  if (threadIdx.x == 0) {
    for (int w = 0; w < 2; ++w) {
      mbarrier_init(ready_of(w), 1);
      mbarrier_init(done_of(w), 4);
    }
    for (int s = 0; s < Wide::kStages; ++s) {
      mbarrier_init(ring.full(s), 33);
      mbarrier_init(ring.empty(s), 8 * kCluster);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if constexpr (kCluster > 1) cluster_sync();
  const int rank = kCluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int tiles = Wide::count(g, kCluster);
  const int first_tile = static_cast<int>(blockIdx.x) / kCluster;
  const int stride = static_cast<int>(gridDim.x) / kCluster;
  const auto blocks_of = [&](int expert) {
    return (g.offsets_E1[expert + 1] - g.offsets_E1[expert] + 127) / 128;
  };
  const auto place_of = [&](int tile) { return Wide::place(g, tile, kCluster, rank); };
  const int warpgroup = warpgroup_index();
  RingPosition<Wide::kStages> at;

  if (warpgroup == 2) {
    give_registers<Wide::kOtherRegisters>();
    const int warp = static_cast<int>(threadIdx.x) / 32 - 8;
    if (warp == 0) {
      if (elect_one()) {
        constexpr int kBytes = Wide::kDyBytes + Wide::kXBytes;
        for (int tile = first_tile; tile < tiles; tile += stride) {
          const WgradPlace place = place_of(tile);
          const int first = g.padded_offsets_E1[place.expert], blocks = blocks_of(place.expert);
          for (int b = 0; b < blocks; ++b, at.advance()) {
            const std::uint32_t to = ring.stage(at);
            const int token = first + b * 128;
            mbarrier_wait(ring.empty(at.stage), at.parity ^ 1);
            const std::uint32_t barrier = ring.full(at.stage);
            if (!variant_of(kCode).loads) {
              mbarrier_arrive(barrier);
              continue;
            }
            mbarrier_arrive_expect(barrier, kBytes);
            if constexpr (kCluster == 2) {
              tma_load_2d_multicast(to + static_cast<std::uint32_t>(rank * 128 * 128), &maps.dy,
                                    barrier, 3, token, place.row + 128 * rank);
            } else {
              tma_load_2d(to, &maps.dy, barrier, token, place.row);
              tma_load_2d(to + 128 * 128, &maps.dy, barrier, token, place.row + 128);
            }
            tma_load_2d(to + Wide::kDyBytes, &maps.x, barrier, token, place.column);
          }
        }
      }
    } else if (warp == 1) {
      // Block scales. x's in the order of the threads' reads: column 16 i + 8 j + 2 q + c at
      // 16 i + 4 q + 2 j + c.
      const int lane = static_cast<int>(threadIdx.x) % 32;
      for (int tile = first_tile; tile < tiles; tile += stride) {
        const WgradPlace place = place_of(tile);
        const int first = g.padded_offsets_E1[place.expert] / 128, blocks = blocks_of(place.expert);
        for (int b = 0; b < blocks; ++b, at.advance()) {
          mbarrier_wait(ring.empty(at.stage), at.parity ^ 1);
          const std::uint32_t to = ring.stage(at);
          const float* dy = dy_scales + static_cast<std::int64_t>(first + b) * g.N;
          const float* x = x_scales + static_cast<std::int64_t>(first + b) * g.K;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int u = lane + 32 * i;
            const int row = place.row + 4 * u, column = place.column + 2 * u;
            if (row < g.N) copy_async_16(to + Wide::kScales + 16 * u, dy + row);
            const int n = 2 * u, word = n / 16 * 16 + n % 8 * 2 + n / 8 % 2 * 2;
            if (column < g.K) copy_async_8(to + Wide::kXScales + 4 * word, x + column);
          }
          copies_arrive(ring.full(at.stage));
        }
      }
    } else if (elect_one()) {
      // Moves the results of a warpgroup, half a tile of it at a time.
      const int w = warp - 2;
      const std::uint32_t boxes = boxes_of(w);
      std::uint32_t parity = 0;
      for (int tile = first_tile; tile < tiles; tile += stride) {
        const WgradPlace place = place_of(tile);
        for (int half = 0; half < 2; ++half, parity ^= 1) {
          const int row = place.row + 128 * w + 64 * half;
          const auto box = [&](int b) { return boxes + static_cast<std::uint32_t>(b * kStoreBoxBytes); };
          if constexpr (kOld) {
            mbarrier_arrive_expect(ready_of(w), Wide::kBoxBytes);
            for (int b = 0; b < Wide::kBoxes; ++b)
              tma_load_3d(box(b), &maps.d, ready_of(w), place.column + 32 * b, row, place.expert,
                          L2Hint::kEvictFirst);
            WgradPlace next = place;
            int next_row = row + 64;
            if (half == 1) {
              next = place_of(min(tile + stride, tiles - 1));
              next_row = next.row + 128 * w;
            }
            for (int b = 0; b < Wide::kBoxes; ++b)
              tma_prefetch_3d(&maps.d, next.column + 32 * b, next_row, next.expert);
          } else {
            mbarrier_arrive(ready_of(w));
          }
          mbarrier_wait(done_of(w), parity);
          for (int b = 0; b < Wide::kBoxes; ++b) {
            if constexpr (kAccumulate && variant_of(kCode).add_in_l2)
              tma_add_3d(&maps.d, box(b), place.column + 32 * b, row, place.expert);
            else if constexpr (variant_of(kCode).hint)
              tma_store_3d_hint(&maps.d, box(b), place.column + 32 * b, row, place.expert,
                                L2Hint::kEvictFirst);
            else
              tma_store_3d(&maps.d, box(b), place.column + 32 * b, row, place.expert);
          }
          tma_store_commit();
          tma_store_wait_read<0>();
        }
      }
    }
  } else {
    take_registers<Wide::kRegisters>();
    float acc[2][64], part[64];
    WideScales scales;
    std::uint32_t parity = 0;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::uint32_t boxes = boxes_of(warpgroup);
    const auto give = [&](float(&values)[64]) {
      mbarrier_wait(ready_of(warpgroup), parity);
      parity ^= 1;
#pragma unroll
      for (int b = 0; b < Wide::kBoxes; ++b)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const std::uint32_t to = place_in_box<float>(
                boxes + static_cast<std::uint32_t>(b * kStoreBoxBytes), h, j);
            const float2 pair = pair_of_box<float>(values, b, h, j);
            if constexpr (kOld) {
              const float2 old = take_pair(to);
              put_pair(to, old.x + pair.x, old.y + pair.y, 0.0f);
            } else {
              put_pair(to, pair.x, pair.y, 0.0f);
            }
          }
      fence_async_shared();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(done_of(warpgroup));
#pragma unroll
      for (float& v : values) v = 0.0f;
    };
    const auto turn = [&](bool passed) {
      if constexpr (variant_of(kCode).turn != 0)
        if (passed) named_arrive(1 + (warpgroup ^ 1), 256);
    };
    const auto start = [&](std::uint32_t stage, int half) {
      if constexpr (variant_of(kCode).turn != 0) named_sync(1 + warpgroup, 256);
      const std::uint64_t dy =
          operand_128b(stage + static_cast<std::uint32_t>((warpgroup * 128 + half * 64) * 128));
      const std::uint64_t x = operand_128b(stage + Wide::kDyBytes);
      keep_registers(part);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma_fp8<kDy, kX>(part, dy + 2 * k, x + 2 * k, k > 0);
        if (variant_of(kCode).turn != 0 && variant_of(kCode).turn < 4 && k == 3 - variant_of(kCode).turn) wgmma_commit();
      }
      wgmma_commit();
      keep_registers(part);
      if constexpr (variant_of(kCode).turn == 4) turn(true);
    };
    const auto finish = [&](std::uint32_t stage, int half, float(&into)[64], bool release,
                            bool pass) {
      constexpr Promote kPromote = variant_of(kCode).promote;
      scales.set(stage, warpgroup * 128 + half * 64);
      if constexpr (kPromote != Promote::kNone) scales.load_rows();
      if constexpr (kPromote == Promote::kFull) scales.load(0, 4);
      if (kPromote == Promote::kShared && half == 0) scales.load(0, 8);
      if constexpr (kPromote == Promote::kNoReads)
        for (int i = 0; i < 8; ++i)
          scales.x[i] = make_float4(scales.upper, scales.lower, scales.lower, scales.upper);
      float ahead[4][8];
      if constexpr (kPromote == Promote::kAhead) {
        scales.load(0, 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) scales.multiply(i, ahead[i]);
      }
      if constexpr (variant_of(kCode).turn != 0 && variant_of(kCode).turn < 4) {
        wgmma_wait<1>();
        turn(pass);
      }
      wgmma_wait<0>();
      keep_registers(part);
      if constexpr (kPromote == Promote::kFull || kPromote == Promote::kAhead) scales.load(4, 8);
      if (release) {
        __syncwarp();
        if constexpr (kCluster > 1) {
          if (lane < kCluster)
            mbarrier_arrive_at(ring.empty(at.stage), static_cast<std::uint32_t>(lane));
        } else {
          if (lane == 0) mbarrier_arrive(ring.empty(at.stage));
        }
      }
      if constexpr (kPromote == Promote::kAhead) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int v = 0; v < 8; ++v)
            into[8 * i + v] = numerics::fma(part[8 * i + v], ahead[i][v], into[8 * i + v]);
        keep_registers(into);
#pragma unroll
        for (int i = 4; i < 8; ++i) scales.multiply(i, ahead[i - 4]);
#pragma unroll
        for (int i = 4; i < 8; ++i)
#pragma unroll
          for (int v = 0; v < 8; ++v)
            into[8 * i + v] = numerics::fma(part[8 * i + v], ahead[i - 4][v], into[8 * i + v]);
      } else {
        scales.template add<kPromote>(part, into);
      }
      keep_registers(into);
    };
    if constexpr (variant_of(kCode).turn != 0)
      if (warpgroup == 1) named_arrive(1, 256);
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (float& v : acc[h]) v = 0.0f;
    bool pending = false;
    int blocks = first_tile < tiles ? blocks_of(place_of(first_tile).expert) : 0;
    for (int tile = first_tile; tile < tiles; tile += stride) {
      const int next_blocks = blocks_of(place_of(min(tile + stride, tiles - 1)).expert);
      for (int b = 0; b < blocks; ++b, at.advance()) {
        const std::uint32_t stage = ring.stage(at);
        ring.wait_full(at);
        start(stage, 0);
        const bool give1 = b == 0 && pending, give0 = b == blocks - 1;
        if (give1) {
          if (variant_of(kCode).turn < 4) turn(true);
          give(acc[1]);
        }
        finish(stage, 0, acc[0], false, !give1);
        start(stage, 1);
        if (give0) {
          if (variant_of(kCode).turn < 4) turn(true);
          give(acc[0]);
        }
        finish(stage, 1, acc[1], true, !give0);
      }
      if (blocks == 0) {
        if (pending) give(acc[1]);
        give(acc[0]);
      }
      pending = true;
      blocks = next_blocks;
    }
    if (pending) give(acc[1]);
    if constexpr (variant_of(kCode).turn != 0)
      if (warpgroup == 0) named_sync(1, 256);
  }
  __syncwarp();
  if constexpr (kCluster > 1) cluster_sync();
  if (threadIdx.x == 0 && blockIdx.x == 0 && cycles != nullptr) *cycles = clock64() - begin;
}

template <Fp8Type kDy, Fp8Type kX, bool kAccumulate, int kCode>
void launch_wide(const Context& ctx, const Fp8Columns& dy, const Fp8Columns& x,
                 const WeightGradient& g, long long* cycles) {
  const std::int64_t R = dy.codes_NR.dim(1);
  const auto codes = [&](const Fp8Columns& c, std::int64_t columns) {
    return tensor_map(c.codes_NR.data, tensor::DType::kE4m3, {{R, 1, 128}, {columns, R, 128}},
                      CU_TENSOR_MAP_SWIZZLE_128B, "fp8_weight_gradient codes");
  };
  const WideMaps maps{wgrad_output_map(g), codes(dy, g.N), codes(x, g.K)};
  const auto kernel = fp8_wide_kernel<kDy, kX, kAccumulate, kCode>;
  allow_shared_memory(kernel, Wide::kAllShared);
  const int most = kMultiprocessors / variant_of(kCode).cluster;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min(Wide::count(g, variant_of(kCode).cluster), most) * variant_of(kCode).cluster));
  config.blockDim = dim3(Wide::kThreads);
  config.dynamicSmemBytes = Wide::kAllShared;
  config.stream = stream_of(ctx);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = variant_of(kCode).cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  tensor::check_cuda(cudaLaunchKernelEx(&config, kernel, maps, g, dy.scales.as<float>(),
                                        x.scales.as<float>(), cycles),
                     "fp8_weight_gradient");
}

}  // namespace lockstep::ops::cuda

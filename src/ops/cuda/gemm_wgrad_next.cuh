#pragma once

#include "ops/cuda/gemm_wgrad_wide.cuh"

namespace lockstep::ops::cuda {

struct NextVariant {
  int rows = 1, columns = 1;  // of a cluster, in tiles
  int promote = 0;            // 0: products before the wait, 1: behind it, 2: none, 3: before it, no barrier
  bool loads = true;
  constexpr int code() const { return rows | columns << 2 | promote << 4 | loads << 8; }
};
constexpr NextVariant next_variant(int c) {
  return {c & 3, c >> 2 & 3, c >> 4 & 15, (c >> 8 & 1) != 0};
}

struct Next {
  static constexpr int kRows = 128, kColumns = 128, kThreads = 384, kRegisters = 240, kOtherRegisters = 24;
  static constexpr int kDyBytes = kRows * 128, kXBytes = kColumns * 128;
  static constexpr int kScales = kDyBytes + kXBytes, kXScales = kScales + 4 * kRows;
  static constexpr int kStageBytes = kXScales + 4 * kColumns;
  static constexpr int kBoxes = 4;
  static constexpr int kBoxBytes = kBoxes * kStoreBoxBytes;
  static constexpr int kShared = kRingSlack + 2 * kBoxBytes;
  static constexpr int kStages = (kSharedMemory - kShared) / kStageBytes;
  static constexpr int kAllShared = kStages * kStageBytes + kShared;
};
template <int kClusterRows, int kClusterColumns>
struct NextTiles {
  static constexpr int kRows = 128 * kClusterRows, kColumns = 128 * kClusterColumns;
  __host__ __device__ static int count(const WeightGradient& x) {
    return x.experts * ((x.N + kRows - 1) / kRows) * ((x.K + kColumns - 1) / kColumns);
  }
  __device__ static WgradPlace place(const WeightGradient& x, int tile, int rank) {
    constexpr int kBand = 1536 / kRows;
    const int row_tiles = (x.N + kRows - 1) / kRows;
    const int column_tiles = (x.K + kColumns - 1) / kColumns;
    const int expert = tile / (row_tiles * column_tiles);
    const int local = tile - expert * row_tiles * column_tiles;
    const int band = local / (kBand * column_tiles);
    const int height = min(kBand, row_tiles - band * kBand);
    const int rest = local - band * kBand * column_tiles;
    return {expert, (band * kBand + rest % height) * kRows + rank / kClusterColumns * 128,
            rest / height * kColumns + rank % kClusterColumns * 128};
  }
};

struct ScaleReader {
  std::uint32_t of_dy, of_x;  // in the stage
  float upper, lower;
  __device__ __forceinline__ ScaleReader() {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    of_dy = Next::kScales + static_cast<std::uint32_t>(thread / 32 * 16 + lane / 4) * 4;
    of_x = Next::kXScales + static_cast<std::uint32_t>(lane % 4) * 16;
  }
  float up, low;
  float4 x[8];
  __device__ __forceinline__ void read(std::uint32_t stage) {
    up = load_shared_float(stage + of_dy);
    low = load_shared_float(stage + of_dy + 32);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(x[i].x), "=f"(x[i].y), "=f"(x[i].z), "=f"(x[i].w)
                   : "r"(stage + of_x + static_cast<std::uint32_t>(i * 64))
                   : "memory");
  }
  __device__ __forceinline__ void multiply(float (&s)[64]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float y[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
      for (int v = 0; v < 8; ++v)
        asm volatile("mul.rn.f32 %0, %1, %2;"
                     : "=f"(s[8 * i + v])
                     : "f"(v % 4 < 2 ? up : low), "f"(y[v / 4 * 2 + v % 2]));
    }
  }
  __device__ __forceinline__ void products(std::uint32_t stage, float (&s)[64]) {
    const float upper = load_shared_float(stage + of_dy);
    const float lower = load_shared_float(stage + of_dy + 32);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float x[4];
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                   : "r"(stage + of_x + static_cast<std::uint32_t>(i * 64))
                   : "memory");
#pragma unroll
      for (int v = 0; v < 8; ++v) s[8 * i + v] = (v % 4 < 2 ? upper : lower) * x[v / 4 * 2 + v % 2];
    }
  }
};

template <Fp8Type kDy, Fp8Type kX, bool kAccumulate, int kCode>
__global__ void __launch_bounds__(Next::kThreads, 1)
    fp8_next_kernel(const __grid_constant__ WideMaps maps, const WeightGradient g,
                    const float* dy_scales, const float* x_scales, long long* cycles) {
  extern __shared__ unsigned char shared[];
  constexpr int kCR = next_variant(kCode).rows, kCC = next_variant(kCode).columns;
  constexpr int kPromote = next_variant(kCode).promote;
  constexpr bool kLoads = next_variant(kCode).loads;
  constexpr int kCluster = kCR * kCC;
  using Tiles = NextTiles<kCR, kCC>;
  const long long begin = clock64();
  const StageRing<Next::kStages, Next::kStageBytes> ring(shared);
  const auto boxes_of = [&](int w) {
    return ring.end() + static_cast<std::uint32_t>(w * Next::kBoxBytes);
  };
  const auto ready_of = [&](int w) { return ring.own_barrier(2 * w); };
  const auto done_of = [&](int w) { return ring.own_barrier(2 * w + 1); };
  if (threadIdx.x == 0) {
    for (int w = 0; w < 2; ++w) {
      mbarrier_init(ready_of(w), 1);
      mbarrier_init(done_of(w), 4);
    }
    for (int s = 0; s < Next::kStages; ++s) {
      mbarrier_init(ring.full(s), 33);
      mbarrier_init(ring.empty(s), 8 * (kCR + kCC - 1));
    }
    fence_barrier_init();
  }
  __syncthreads();
  if constexpr (kCluster > 1) cluster_sync();
  const int rank = kCluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int tiles = Tiles::count(g);
  const int first_tile = static_cast<int>(blockIdx.x) / kCluster;
  const int stride = static_cast<int>(gridDim.x) / kCluster;
  const auto blocks_of = [&](int expert) {
    return (g.offsets_E1[expert + 1] - g.offsets_E1[expert] + 127) / 128;
  };
  const auto place_of = [&](int tile) { return Tiles::place(g, tile, rank); };
  const int warpgroup = warpgroup_index();
  RingPosition<Next::kStages> at;

  if (warpgroup == 2) {
    give_registers<Next::kOtherRegisters>();
    const int warp = static_cast<int>(threadIdx.x) / 32 - 8;
    if (warp == 0) {
      if (elect_one()) {
        const int my_row = rank / kCC, my_column = rank % kCC;
        // dy's tile is for the cluster's tiles of this row, x's for those of this column.
        std::uint16_t row_mask = 0, column_mask = 0;
        for (int c = 0; c < kCC; ++c) row_mask |= static_cast<std::uint16_t>(1 << (my_row * kCC + c));
        for (int r = 0; r < kCR; ++r) column_mask |= static_cast<std::uint16_t>(1 << (r * kCC + my_column));
        for (int tile = first_tile; tile < tiles; tile += stride) {
          const WgradPlace place = place_of(tile);
          const int first = g.padded_offsets_E1[place.expert], blocks = blocks_of(place.expert);
          for (int b = 0; b < blocks; ++b, at.advance()) {
            const std::uint32_t to = ring.stage(at), x_to = to + Next::kDyBytes;
            const int token = first + b * 128;
            mbarrier_wait(ring.empty(at.stage), at.parity ^ 1);
            const std::uint32_t barrier = ring.full(at.stage);
            if (!kLoads) {
              mbarrier_arrive(barrier);
              continue;
            }
            mbarrier_arrive_expect(barrier, Next::kDyBytes + Next::kXBytes);
            constexpr int kDyPart = 128 / kCC, kXPart = 128 / kCR;
            if constexpr (kCC > 1)
              tma_load_2d_multicast(to + static_cast<std::uint32_t>(my_column * kDyPart * 128), &maps.dy,
                                    barrier, row_mask, token, place.row + my_column * kDyPart);
            else
              tma_load_2d(to, &maps.dy, barrier, token, place.row);
            if constexpr (kCR > 1)
              tma_load_2d_multicast(x_to + static_cast<std::uint32_t>(my_row * kXPart * 128), &maps.x,
                                    barrier, column_mask, token, place.column + my_row * kXPart);
            else
              tma_load_2d(x_to, &maps.x, barrier, token, place.column);
          }
        }
      }
    } else if (warp == 1) {
      const int lane = static_cast<int>(threadIdx.x) % 32;
      for (int tile = first_tile; tile < tiles; tile += stride) {
        const WgradPlace place = place_of(tile);
        const int first = g.padded_offsets_E1[place.expert] / 128, blocks = blocks_of(place.expert);
        const int row = place.row + 4 * lane, column = place.column + 2 * lane;
        const int n = 2 * lane, word = n / 16 * 16 + n % 8 * 2 + n / 8 % 2 * 2;
        for (int b = 0; b < blocks; ++b, at.advance()) {
          mbarrier_wait(ring.empty(at.stage), at.parity ^ 1);
          const std::uint32_t to = ring.stage(at);
          const float* dy = dy_scales + static_cast<std::int64_t>(first + b) * g.N;
          const float* x = x_scales + static_cast<std::int64_t>(first + b) * g.K;
          if (row < g.N) copy_async_16(to + Next::kScales + 16 * lane, dy + row);
          if (column < g.K) copy_async_8(to + Next::kXScales + 4 * word, x + column);
          if (column + 64 < g.K) copy_async_8(to + Next::kXScales + 4 * word + 256, x + column + 64);
          copies_arrive(ring.full(at.stage));
        }
      }
    } else if (elect_one()) {
      const int w = warp - 2;
      const std::uint32_t boxes = boxes_of(w);
      std::uint32_t parity = 0;
      for (int tile = first_tile; tile < tiles; tile += stride, parity ^= 1) {
        const WgradPlace place = place_of(tile);
        const int row = place.row + 64 * w;
        const auto box = [&](int b) { return boxes + static_cast<std::uint32_t>(b * kStoreBoxBytes); };
        if constexpr (kAccumulate) {
          mbarrier_arrive_expect(ready_of(w), Next::kBoxBytes);
          for (int b = 0; b < Next::kBoxes; ++b)
            tma_load_3d(box(b), &maps.d, ready_of(w), place.column + 32 * b, row, place.expert,
                        L2Hint::kEvictFirst);
          if (tile + stride < tiles) {
            const WgradPlace next = place_of(tile + stride);
            for (int b = 0; b < Next::kBoxes; ++b)
              tma_prefetch_3d(&maps.d, next.column + 32 * b, next.row + 64 * w, next.expert);
          }
        } else {
          mbarrier_arrive(ready_of(w));
        }
        mbarrier_wait(done_of(w), parity);
        for (int b = 0; b < Next::kBoxes; ++b)
          tma_store_3d_hint(&maps.d, box(b), place.column + 32 * b, row, place.expert,
                            L2Hint::kEvictFirst);
        tma_store_commit();
        tma_store_wait_read<0>();
      }
    }
  } else {
    take_registers<Next::kRegisters>();
    float acc[64], part[64], products[64];
    std::uint32_t parity = 0;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::uint32_t boxes = boxes_of(warpgroup);
    ScaleReader scales;
    const auto give = [&] {
      mbarrier_wait(ready_of(warpgroup), parity);
      parity ^= 1;
#pragma unroll
      for (int b = 0; b < Next::kBoxes; ++b)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const std::uint32_t to = place_in_box<float>(
                boxes + static_cast<std::uint32_t>(b * kStoreBoxBytes), h, j);
            float2 pair = pair_of_box<float>(acc, b, h, j);
            if constexpr (kAccumulate) {
              const float2 old = take_pair(to);
              pair = make_float2(old.x + pair.x, old.y + pair.y);
            }
            const float low = pair.x == pair.x ? pair.x : __uint_as_float(0x7FC00000u);
            const float high = pair.y == pair.y ? pair.y : __uint_as_float(0x7FC00000u);
            asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(low), "f"(high) : "memory");
          }
      fence_async_shared();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(done_of(warpgroup));
#pragma unroll
      for (float& v : acc) v = 0.0f;
    };
#pragma unroll
    for (float& v : acc) v = 0.0f;
    if constexpr (kPromote == 5 || kPromote == 8) scales.read(ring.stage(0));
    if constexpr (kPromote == 8) {
      scales.multiply(products);
      mbarrier_wait(ring.full(0), 1);
    }
    bool pending = false;
    int blocks = first_tile < tiles ? blocks_of(place_of(first_tile).expert) : 0;
    for (int tile = first_tile; tile < tiles; tile += stride) {
      const int next_blocks = blocks_of(place_of(min(tile + stride, tiles - 1)).expert);
      for (int b = 0; b < blocks; ++b) {
        const std::uint32_t stage = ring.stage(at);
        const int stage_index = at.stage;
        ring.wait_full(at);
        at.advance();
        if constexpr (kPromote == 6) {
          scales.products(stage, products);
          mbarrier_wait(ring.full(stage_index), at.parity ^ (at.stage == 0 ? 1u : 0u));
        }
        if (kPromote == 7 && b == 0) scales.read(stage);
        const std::uint64_t dy =
            operand_128b(stage + static_cast<std::uint32_t>(warpgroup * 64 * 128));
        const std::uint64_t x = operand_128b(stage + Next::kDyBytes);
        keep_registers(part);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) wgmma_fp8<kDy, kX>(part, dy + 2 * k, x + 2 * k, k > 0);
        wgmma_commit();
        keep_registers(part);
        if (b == 0 && pending) give();
        if constexpr (kPromote == 0 || kPromote == 3) scales.products(stage, products);
        if constexpr (kPromote == 4) scales.read(stage);
        if constexpr (kPromote == 5 || kPromote == 7) scales.multiply(products);
        if constexpr (kPromote == 0 || kPromote == 5 || kPromote == 7) {
          // The compiler does not carry the products across a loop.
          mbarrier_wait(ring.full(stage_index), at.parity ^ (at.stage == 0 ? 1u : 0u));
        }
        wgmma_wait<0>();
        keep_registers(part);
        if constexpr (kPromote == 1) scales.products(stage, products);
        if constexpr (kPromote == 7) {
          if (b + 1 < blocks) {
            ring.wait_full(at);
            scales.read(ring.stage(at));
          }
        }
        __syncwarp();
        if constexpr (kCluster > 1) {
          if (lane < kCluster &&
              (lane / kCC == rank / kCC || lane % kCC == rank % kCC))
            mbarrier_arrive_at(ring.empty(stage_index), static_cast<std::uint32_t>(lane));
        } else {
          if (lane == 0) mbarrier_arrive(ring.empty(stage_index));
        }
        if constexpr (kPromote == 2 || kPromote == 4) {
          acc[0] = acc[0] + part[0];
        } else {
#pragma unroll
          for (int i = 0; i < 64; ++i) acc[i] = numerics::fma(part[i], products[i], acc[i]);
        }
        keep_registers(acc);
      }
      if (blocks == 0 && pending) give();
      pending = true;
      blocks = next_blocks;
    }
    if (pending) give();
  }
  __syncwarp();
  if constexpr (kCluster > 1) cluster_sync();
  if (threadIdx.x == 0 && blockIdx.x == 0 && cycles != nullptr) *cycles = clock64() - begin;
}

template <Fp8Type kDy, Fp8Type kX, bool kAccumulate, int kCode>
void launch_next(const Context& ctx, const Fp8Columns& dy, const Fp8Columns& x,
                 const WeightGradient& g, long long* cycles) {
  const std::int64_t R = dy.codes_NR.dim(1);
  constexpr NextVariant kV = next_variant(kCode);
  constexpr int kCluster = kV.rows * kV.columns;
  const auto codes = [&](const Fp8Columns& c, std::int64_t columns, int box) {
    return tensor_map(c.codes_NR.data, tensor::DType::kE4m3, {{R, 1, 128}, {columns, R, box}},
                      CU_TENSOR_MAP_SWIZZLE_128B, "fp8_weight_gradient codes");
  };
  const WideMaps maps{wgrad_output_map(g), codes(dy, g.N, 128 / kV.columns), codes(x, g.K, 128 / kV.rows)};
  const auto kernel = fp8_next_kernel<kDy, kX, kAccumulate, kCode>;
  allow_shared_memory(kernel, Next::kAllShared);
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(Next::kThreads);
  config.dynamicSmemBytes = Next::kAllShared;
  config.stream = stream_of(ctx);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kCluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  config.gridDim = dim3(kCluster);
  int most = kMultiprocessors;
  if (kCluster > 1)
    tensor::check_cuda(cudaOccupancyMaxActiveClusters(&most, kernel, &config), "fp8_weight_gradient");
  config.gridDim =
      dim3(static_cast<unsigned>(std::min(NextTiles<kV.rows, kV.columns>::count(g), most) * kCluster));
  tensor::check_cuda(cudaLaunchKernelEx(&config, kernel, maps, g, dy.scales.as<float>(),
                                        x.scales.as<float>(), cycles),
                     "fp8_weight_gradient");
}

}  // namespace lockstep::ops::cuda

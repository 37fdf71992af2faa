// d[e, n, k] = sum over the rows m of segment e of dy[m, n] x[m, k], BF16: one chain over the rows
// in steps of 16 from the segment's first. Rows behind the segment's end belong to others: they are
// made zero in shared memory.
#include <algorithm>

#include "ops/cuda/gemm_bf16.h"
#include "ops/cuda/gemm_plain.h"
#include "ops/cuda/gemm_wgrad.cuh"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/tensor_map.h"

namespace lockstep::ops::cuda {
namespace {

using numerics::Bf16;
using tensor::DType;

constexpr int kDepth = 64;              // rows a stage
constexpr int kSlab = kDepth * 128;     // [rows, 64 columns] of an operand
constexpr int kStageBytes = 4 * kSlab;  // two slabs of dy, two of x
constexpr int kStages = 6;
constexpr int kShared = kStages * kStageBytes + kRingSlack;

// Rows [begin, end) of the stage's slabs to zero; both warpgroups.
__device__ void clear_rows(std::uint32_t stage, int begin, int end) {
  const int units = (end - begin) * 32;  // of 16 bytes
  for (int u = static_cast<int>(threadIdx.x); u < units; u += 256) {
    const std::uint32_t to = stage + static_cast<std::uint32_t>(
                                         u % 4 * kSlab + (begin + u / 32) * 128 + u % 32 / 4 * 16);
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
  }
  fence_async_shared();
  named_sync(1, 256);
}

template <bool kAccumulate>
__global__ void __launch_bounds__(kWgradThreads, 1)
    bf16_wgrad_kernel(const __grid_constant__ CUtensorMap dy_map,
                      const __grid_constant__ CUtensorMap x_map, const WeightGradient x) {
  extern __shared__ unsigned char shared[];
  const Ring<kStages, kStageBytes> ring(shared);
  ring.init(8);
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  const int tiles = wgrad_tiles(x);
  RingPosition<kStages> at;

  if (warpgroup == 2) {
    give_registers<40>();
    if (threadIdx.x / 32 != 8 || !elect_one()) return;
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles;
         tile += static_cast<int>(gridDim.x)) {
      const WgradPlace place = wgrad_place(x, tile);
      const int first = x.offsets_E1 == nullptr ? 0 : x.offsets_E1[place.expert];
      const int last = x.offsets_E1 == nullptr ? x.M : x.offsets_E1[place.expert + 1];
      for (int row = first; row < last; row += kDepth, at.advance()) {
        const std::uint32_t barrier = ring.start_fill(at, kStageBytes), to = ring.stage(at);
        for (int slab = 0; slab < 2; ++slab) {
          tma_load_2d(to + static_cast<std::uint32_t>(slab * kSlab), &dy_map, barrier,
                      place.row + slab * 64, row);
          tma_load_2d(to + static_cast<std::uint32_t>((2 + slab) * kSlab), &x_map, barrier,
                      place.column + slab * 64, row);
        }
      }
    }
    return;
  }

  take_registers<232>();
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
    const WgradPlace place = wgrad_place(x, tile);
    const int rows =
        x.offsets_E1 == nullptr ? x.M : x.offsets_E1[place.expert + 1] - x.offsets_E1[place.expert];
    float2 old[32];
    load_old<kAccumulate>(x, place, old);
    float acc[64];
#pragma unroll
    for (float& c : acc) c = 0.0f;
    for (int row = 0; row < rows; row += kDepth, at.advance()) {
      ring.wait_full(at);
      const std::uint32_t stage = ring.stage(at);
      const std::uint32_t dy = stage + static_cast<std::uint32_t>(warpgroup * kSlab);
      if (rows - row < kDepth) clear_rows(stage, rows - row, kDepth);
      keep_registers(acc);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kDepth / 16; ++step)
        wgmma_bf16<Major::kMn, Major::kMn>(
            acc, operand_128b(dy + static_cast<std::uint32_t>(step * 2048), 1024, kSlab),
            operand_128b(stage + 2 * kSlab + static_cast<std::uint32_t>(step * 2048), 1024, kSlab),
            true);
      wgmma_commit();
      keep_registers(acc);
      wgmma_wait<1>();
      if (row > 0) ring.release_before(at);
    }
    wgmma_wait<0>();
    keep_registers(acc);
    if (rows > 0) ring.release_before(at);
    write_new<kAccumulate>(x, place, old, acc);
  }
}

template <bool kAccumulate>
void launch(const Context& ctx, const TensorView& dy_MN, const TensorView& x_MK,
            const WeightGradient& x) {
  const auto map = [&](const TensorView& t, std::int64_t columns) {
    return tensor_map(t.data, DType::kBf16, {{columns, 2, 64}, {x.M, columns * 2, kDepth}},
                      CU_TENSOR_MAP_SWIZZLE_128B, "bf16_weight_gradient");
  };
  const auto kernel = bf16_wgrad_kernel<kAccumulate>;
  allow_shared_memory(kernel, kShared);
  const auto blocks = static_cast<unsigned>(std::min(wgrad_tiles(x), kMultiprocessors));
  kernel<<<blocks, kWgradThreads, kShared, stream_of(ctx)>>>(map(dy_MN, x.N), map(x_MK, x.K), x);
  LOCKSTEP_CUDA_LAUNCHED("bf16_weight_gradient");
}

bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

}  // namespace

void bf16_weight_gradient(const Context& ctx, const TensorView& dy_MN, const TensorView& x_MK,
                          const TensorView& offsets_E1, bool accumulate, const TensorView& d_ENK) {
  const std::int64_t M = dy_MN.dim(0), E = d_ENK.dim(0), N = d_ENK.dim(1), K = d_ENK.dim(2);
  if (E == 0 || N == 0 || K == 0) return;
  const std::int32_t* offsets = offsets_E1 ? offsets_E1.as<std::int32_t>() : nullptr;
  const bool rows_at_16_bytes = K % 8 == 0 && N % 8 == 0 && M > 0 && aligned(dy_MN.data) &&
                                aligned(x_MK.data) && aligned(d_ENK.data);
  if (!rows_at_16_bytes)
    return plain_gemm(ctx, {dy_MN.as<Bf16>(), 1, N, x_MK.as<Bf16>(), 1, K, d_ENK.data, true,
                            accumulate, offsets, true, E, N, K, M});
  const WeightGradient x{offsets,
                         nullptr,
                         d_ENK.as<float>(),
                         static_cast<int>(E),
                         static_cast<int>(M),
                         static_cast<int>(N),
                         static_cast<int>(K)};
  accumulate ? launch<true>(ctx, dy_MN, x_MK, x) : launch<false>(ctx, dy_MN, x_MK, x);
}

}  // namespace lockstep::ops::cuda

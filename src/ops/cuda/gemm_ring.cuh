// A ring of stages in shared memory between a warp that fills them with the copy engine and
// warpgroups that read them; and how results reach device memory.
#pragma once

#include "numerics/formats.h"
#include "ops/cuda/ptx.cuh"
#include "tensor/cuda_check.h"

namespace lockstep::ops::cuda {

// Stage and parity of a walk around the ring.
template <int kStages>
struct RingPosition {
  int stage = 0;
  std::uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

inline constexpr int kRingSlack = 2048;  // for alignment to 1024 bytes and the barriers

template <int kStages, int kStageBytes>
class Ring {
 public:
  static_assert(kStageBytes % 1024 == 0 && 16 * kStages <= 1024);
  using Position = RingPosition<kStages>;

  __device__ explicit Ring(const void* shared)
      : stages_((shared_address(shared) + 1023) & ~1023u),
        barriers_(stages_ + kStages * kStageBytes) {}
  // All threads of the block; `readers` = warps that will release each stage.
  __device__ void init(int readers) const {
    if (threadIdx.x == 0) {
      for (int s = 0; s < kStages; ++s) {
        mbarrier_init(full(s), 1);
        mbarrier_init(empty(s), static_cast<std::uint32_t>(readers));
      }
      fence_barrier_init();
    }
    __syncthreads();
  }
  __device__ std::uint32_t stage(const Position& at) const {
    return stages_ + static_cast<std::uint32_t>(at.stage * kStageBytes);
  }
  // One thread: waits until the stage is free and says how many bytes will come; returns the
  // barrier to load with.
  __device__ std::uint32_t start_fill(const Position& at, std::uint32_t bytes) const {
    mbarrier_wait(empty(at.stage), at.parity ^ 1);
    mbarrier_arrive_expect(full(at.stage), bytes);
    return full(at.stage);
  }
  __device__ void wait_full(const Position& at) const { mbarrier_wait(full(at.stage), at.parity); }
  // The stage before `at` is read no more by this warp.
  __device__ void release_before(const Position& at) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty(at.stage == 0 ? kStages - 1 : at.stage - 1));
  }

 private:
  __device__ std::uint32_t full(int stage) const {
    return barriers_ + static_cast<std::uint32_t>(8 * stage);
  }
  __device__ std::uint32_t empty(int stage) const {
    return barriers_ + static_cast<std::uint32_t>(8 * (kStages + stage));
  }
  std::uint32_t stages_, barriers_;
};

// Before the launch of a kernel that takes more than 48 KB of shared memory.
template <typename Kernel>
void allow_shared_memory(Kernel kernel, int bytes) {
  tensor::check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
      "shared memory of a GEMM");
}

// GEMMs store NaN as 0x7FC00000.
__device__ __forceinline__ float canonical(float x) {
  return numerics::is_nan(x) ? numerics::bits_float(0x7FC00000u) : x;
}
__device__ __forceinline__ void store_pair(float* to, float low, float high) {
  *reinterpret_cast<float2*>(to) = make_float2(canonical(low), canonical(high));
}
__device__ __forceinline__ void store_pair(numerics::Bf16* to, float low, float high) {
  *reinterpret_cast<std::uint32_t*>(to) = pack_bf16(low, high);
}
__device__ __forceinline__ void store_one(float* to, float x) { *to = canonical(x); }
__device__ __forceinline__ void store_one(numerics::Bf16* to, float x) {
  *to = numerics::to_bf16(x);
}

}  // namespace lockstep::ops::cuda

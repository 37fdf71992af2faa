// A ring of stages in shared memory between a warp that fills them with the copy engine and
// warpgroups that read them.
#pragma once

#include "ops/cuda/ptx.cuh"
#include "tensor/cuda_check.h"

namespace lockstep::ops::cuda {

// The same in all lanes, and known to be: addresses made from it stay in uniform registers.
__device__ __forceinline__ int warpgroup_index() {
  return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / 128, 0);
}

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

inline constexpr int kSharedMemory = 232448;             // that a block may have
inline constexpr int kRingBarriers = 1024;               // bytes behind the stages
inline constexpr int kRingSlack = 1024 + kRingBarriers;  // with alignment to 1024 bytes

template <int kStages, int kStageBytes>
class StageRing {
 public:
  static_assert(kStageBytes % 1024 == 0 && 16 * kStages + 64 <= kRingBarriers);
  using Position = RingPosition<kStages>;

  __device__ explicit StageRing(const void* shared)
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
  __device__ std::uint32_t stage(int index) const {
    return stages_ + static_cast<std::uint32_t>(index * kStageBytes);
  }
  __device__ std::uint32_t stage(const Position& at) const { return stage(at.stage); }
  // The address of one more barrier, for the kernel's own use; initialise it before init().
  __device__ std::uint32_t own_barrier(int i) const {
    return barriers_ + static_cast<std::uint32_t>(8 * (2 * kStages + i));
  }
  // Shared memory behind the ring's own, 1024-aligned.
  __device__ std::uint32_t end() const { return barriers_ + kRingBarriers; }
  // One thread: waits until the stage is free and says how many bytes will come; returns the
  // barrier to load with.
  __device__ std::uint32_t start_fill(const Position& at, std::uint32_t bytes) const {
    mbarrier_wait(empty(at.stage), at.parity ^ 1);
    mbarrier_arrive_expect(full(at.stage), bytes);
    return full(at.stage);
  }
  __device__ void wait_full(const Position& at) const { mbarrier_wait(full(at.stage), at.parity); }
  // A stage, or the one before `at`, is read no more by this warp.
  __device__ void release(int stage) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty(stage));
  }
  __device__ void release_before(const Position& at) const {
    release(at.stage == 0 ? kStages - 1 : at.stage - 1);
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

}  // namespace lockstep::ops::cuda

// A slot in shared memory through which one thread of a CTA hands out tiles. A CTA claims its next
// tile when it begins one: an expert's last row tile costs less than the others, and with a fixed
// stride multiprocessors would wait for those that met more full ones.
#pragma once

#include "ops/cuda/ptx.cuh"

namespace lockstep::ops::cuda {

struct TileQueue {
  std::uint32_t at;  // 16-aligned: an int4, then barriers "there is a tile" and "all have read it"
  std::uint32_t phase = 0;

  static constexpr int kBytes = 32;
  // One thread. `warps` will take every tile.
  __device__ void init(int warps) const {
    mbarrier_init(full(), 1);
    mbarrier_init(empty(), static_cast<std::uint32_t>(32 * warps));
  }

  // The thread that hands out: puts, then waits until all have read.
  __device__ void put(int4 tile) const {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(tile.x), "r"(tile.y),
                 "r"(tile.z), "r"(tile.w)
                 : "memory");
    mbarrier_arrive(full());
  }
  __device__ void wait_taken() {
    mbarrier_wait(empty(), phase);
    phase ^= 1;
  }

  // All lanes of a warp.
  __device__ int4 take() {
    mbarrier_wait(full(), phase);
    phase ^= 1;
    int4 tile;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile.x), "=r"(tile.y), "=r"(tile.z), "=r"(tile.w)
                 : "r"(at)
                 : "memory");
    mbarrier_arrive(empty());
    return tile;
  }

 private:
  __device__ std::uint32_t full() const { return at + 16; }
  __device__ std::uint32_t empty() const { return at + 24; }
};

}  // namespace lockstep::ops::cuda

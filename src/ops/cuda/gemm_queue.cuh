// A slot in shared memory through which one thread of a cluster hands out tiles. A cluster claims
// its next tile when it begins one: an expert's last row tile costs less than the others, and with
// a fixed stride multiprocessors would wait for those that met more full ones.
#pragma once

#include "ops/cuda/ptx.cuh"

namespace lockstep::ops::cuda {

// The same in every CTA of a cluster; a thread of rank 0 hands out.
template <int kCluster>
struct TileQueue {
  std::uint32_t at;  // 16-aligned: an int4, then barriers "there is a tile" and "all have read it"
  std::uint32_t phase = 0;

  static constexpr int kBytes = 32;
  // One thread; `readers` a CTA.
  __device__ void init(int readers) const {
    mbarrier_init(full(), 1);
    mbarrier_init(empty(), static_cast<std::uint32_t>(readers * kCluster));
  }

  // The thread that hands out: puts something into every CTA, then waits until all have read it.
  __device__ void put(int rank, int4 tile) const {
    if constexpr (kCluster == 1) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(tile.x), "r"(tile.y),
                   "r"(tile.z), "r"(tile.w)
                   : "memory");
      mbarrier_arrive(full());
    } else {
      asm volatile(
          "{\n.reg .b32 slot, barrier;\n"
          "mapa.shared::cluster.u32 slot, %0, %2;\n"
          "mapa.shared::cluster.u32 barrier, %1, %2;\n"
          "st.shared::cluster.v4.b32 [slot], {%3, %4, %5, %6};\n"
          "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [barrier];\n}\n" ::"r"(at),
          "r"(full()), "r"(rank), "r"(tile.x), "r"(tile.y), "r"(tile.z), "r"(tile.w)
          : "memory");
    }
  }
  __device__ void wait_taken() {
    wait(empty());
    phase ^= 1;
  }

  // A reader is a warp: all its lanes take; the slot may be written again when all readers have.
  __device__ int4 take(int lane) {
    wait(full());
    phase ^= 1;
    int4 tile;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile.x), "=r"(tile.y), "=r"(tile.z), "=r"(tile.w)
                 : "r"(at)
                 : "memory");
    __syncwarp();
    if (lane == 0) {
      if constexpr (kCluster == 1)
        mbarrier_arrive(empty());
      else
        asm volatile(
            "{\n.reg .b32 barrier;\n"
            "mapa.shared::cluster.u32 barrier, %0, 0;\n"
            "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [barrier];\n}\n" ::"r"(empty())
            : "memory");
    }
    return tile;
  }

 private:
  __device__ std::uint32_t full() const { return at + 16; }
  __device__ std::uint32_t empty() const { return at + 24; }
  __device__ void wait(std::uint32_t barrier) const {
    if constexpr (kCluster == 1) {
      mbarrier_wait(barrier, phase);
    } else {
      std::uint32_t done;
      do {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(done)
            : "r"(barrier), "r"(phase)
            : "memory");
      } while (done == 0);
    }
  }
};

}  // namespace lockstep::ops::cuda

// A slot in shared memory through which one thread of a cluster hands out tiles, so that a cluster
// takes its next tile when it has begun the last: tiles of an expert's end are cheaper than others,
// and a fixed stride leaves multiprocessors idle.
#pragma once

#include "ops/cuda/ptx.cuh"

namespace lockstep::ops::cuda {

// The same in every CTA of a cluster; the CTA of rank 0 hands out.
struct TileQueue {
  std::uint32_t at;  // 16-aligned: an int4, then two barriers: there is a tile; all have read it
  std::uint32_t phase = 0;

  static constexpr int kBytes = 32;
  __device__ std::uint32_t full() const { return at + 16; }
  __device__ std::uint32_t empty() const { return at + 24; }
  // One thread; `readers` in all CTAs of the cluster.
  __device__ void init(int readers) const {
    mbarrier_init(full(), 1);
    mbarrier_init(empty(), static_cast<std::uint32_t>(readers));
  }

  // The thread that hands out: puts a tile into every CTA, then waits until all have read it.
  __device__ void wait_taken() {
    wait(empty(), phase);
    phase ^= 1;
  }
  __device__ void put(int rank, int4 tile) const {
    asm volatile(
        "{\n.reg .b32 slot, barrier;\n"
        "mapa.shared::cluster.u32 slot, %0, %2;\n"
        "mapa.shared::cluster.u32 barrier, %1, %2;\n"
        "st.shared::cluster.v4.b32 [slot], {%3, %4, %5, %6};\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [barrier];\n}\n" ::"r"(at),
        "r"(full()), "r"(rank), "r"(tile.x), "r"(tile.y), "r"(tile.z), "r"(tile.w)
        : "memory");
  }
  // Readers: all threads that need the tile take it, then one for each reader says so.
  __device__ int4 take() {
    wait(full(), phase);
    phase ^= 1;
    int4 tile;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tile.x), "=r"(tile.y), "=r"(tile.z), "=r"(tile.w)
                 : "r"(at)
                 : "memory");
    return tile;
  }
  __device__ void taken() const {
    asm volatile(
        "{\n.reg .b32 barrier;\n"
        "mapa.shared::cluster.u32 barrier, %0, 0;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [barrier];\n}\n" ::"r"(empty())
        : "memory");
  }

 private:
  __device__ static void wait(std::uint32_t barrier, std::uint32_t parity) {
    std::uint32_t done;
    do {
      asm volatile(
          "{\n.reg .pred p;\n"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n}\n"
          : "=r"(done)
          : "r"(barrier), "r"(parity)
          : "memory");
    } while (done == 0);
  }
};

}  // namespace lockstep::ops::cuda

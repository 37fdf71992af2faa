// Warp-level tensor-core steps and the loads that feed them (PTX ISA, "mma.m16n8k16",
// "ldmatrix", "cp.async"). With g = lane / 4 and t = lane % 4: an accumulator holds (row g, columns
// 2t, 2t+1) and (row g+8, the same); a step has the bits of wgmma's (docs/numerics.md, section 4).
#pragma once

#include <cstdint>

#include "numerics/formats.h"

namespace lockstep::ops::cuda {

__device__ inline unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

__device__ inline void mma_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices, whose row addresses lanes 0-7, 8-15, 16-23 and 24-31 give.
__device__ inline void load_matrices(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_matrices_transposed(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// A tile of rows in shared memory, `stride` elements apart (a multiple of 8 that is odd in 16-byte
// units, so that eight rows lie in different banks).
struct SharedTile {
  unsigned address;
  int stride;

  __device__ unsigned at(int row, int column) const {
    return address + 2u * static_cast<unsigned>(row * stride + column);
  }
  // The 16x16 operand A at (row, column): rows are A's rows.
  __device__ void load_a(unsigned (&r)[4], int row, int column, int lane) const {
    load_matrices(r, at(row + lane % 16, column + lane / 16 * 8));
  }
  // The same of the transposed tile: A's rows are the tile's columns.
  __device__ void load_a_transposed(unsigned (&r)[4], int row, int column, int lane) const {
    load_matrices_transposed(r, at(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
  }
  // Two operands B of 16 along the contraction and 8 wide: r[0..1] and r[2..3]. Rows are B's
  // columns (the contraction runs along a row).
  __device__ void load_b(unsigned (&r)[4], int row, int column, int lane) const {
    load_matrices(r, at(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
  }
  // The same where the contraction runs down the rows: B's columns are the tile's.
  __device__ void load_b_transposed(unsigned (&r)[4], int row, int column, int lane) const {
    load_matrices_transposed(r, at(row + lane % 16, column + lane / 16 * 8));
  }
};

// 16 bytes to shared memory, zeros where not `present` (then nothing is read).
__device__ inline void copy_async(unsigned to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from),
               "r"(present ? 16 : 0)
               : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int kPending>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Two FP32 rounded to BF16 (nearest even, NaN 0x7FFF); `low` comes first in memory.
__device__ inline unsigned pack_bf16(float low, float high) {
  unsigned r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

}  // namespace lockstep::ops::cuda

// Operands of warp-level tensor-core steps (mma_bf16 of ptx.cuh) from shared memory, and
// asynchronous copies of 16 bytes. With g = lane / 4 and t = lane % 4: an accumulator holds (row g,
// columns 2t, 2t+1) and (row g+8, the same).
#pragma once

#include <cstdint>

#include "ops/cuda/ptx.cuh"

namespace lockstep::ops::cuda {

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
    load_matrix_x4(at(row + lane % 16, column + lane / 16 * 8), r);
  }
  // The same of the transposed tile: A's rows are the tile's columns.
  __device__ void load_a_transposed(unsigned (&r)[4], int row, int column, int lane) const {
    load_matrix_x4_transposed(at(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8), r);
  }
  // Two operands B of 16 along the contraction and 8 wide: r[0..1] and r[2..3]. Rows are B's
  // columns (the contraction runs along a row).
  __device__ void load_b(unsigned (&r)[4], int row, int column, int lane) const {
    load_matrix_x4(at(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8), r);
  }
  // The same where the contraction runs down the rows: B's columns are the tile's.
  __device__ void load_b_transposed(unsigned (&r)[4], int row, int column, int lane) const {
    load_matrix_x4_transposed(at(row + lane % 16, column + lane / 16 * 8), r);
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

}  // namespace lockstep::ops::cuda

// The BF16 tensor-core chain on a small tile, for the CPU's GEMM and attention (docs/numerics.md,
// section 4).
#pragma once

#include "ops/cpu/isa.h"

namespace lockstep::ops::cpu {

// A matrix of BF16 with free strides, in elements: value (row, k) is at data[row * row_stride + k *
// k_stride].
struct StridedBf16 {
  const numerics::Bf16* data;
  std::int64_t row_stride;
  std::int64_t k_stride;
};

// c[m, n] = chain over k of a(m, k) b(n, k) from c[m, n], steps of 16 counted from k = 0, the last
// one padded with zeros. One thread.
LOCKSTEP_CPU_DECLARE(void bf16_chain(const StridedBf16& a, const StridedBf16& b, float* c,
                                     std::int64_t c_stride, std::int64_t M, std::int64_t N,
                                     std::int64_t K);)

}  // namespace lockstep::ops::cpu

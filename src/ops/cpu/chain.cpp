#include "ops/cpu/chain.h"

#include "numerics/tensor_core.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {

void bf16_chain(const StridedBf16& a, const StridedBf16& b, float* c, std::int64_t c_stride,
                std::int64_t M, std::int64_t N, std::int64_t K) {
  constexpr int kStep = numerics::kBf16Step.terms;
  for (std::int64_t m = 0; m < M; ++m)
    for (std::int64_t n = 0; n < N; ++n)
      for (std::int64_t k0 = 0; k0 < K; k0 += kStep) {
        numerics::Term ta[kStep], tb[kStep];
        for (int i = 0; i < kStep; ++i) {
          const std::int64_t k = k0 + i;
          ta[i] = numerics::bf16_term(k < K ? a.data[m * a.row_stride + k * a.k_stride]
                                            : numerics::Bf16{0});
          tb[i] = numerics::bf16_term(k < K ? b.data[n * b.row_stride + k * b.k_stride]
                                            : numerics::Bf16{0});
        }
        float& out = c[m * c_stride + n];
        out = numerics::tensor_core_step(numerics::kBf16Step, ta, tb, out);
      }
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA

#include "ops/cpu/embedding.h"

#include <algorithm>
#include <cstring>

namespace lockstep::ops::cpu::LOCKSTEP_ISA {

using numerics::Bf16;

void embedding(const Context& ctx, const TensorView& tokens_T, const TensorView& w_VD,
               const TensorView& x_TD) {
  const std::int64_t T = x_TD.dim(0), D = x_TD.dim(1);
  const auto* tokens = static_cast<const std::int32_t*>(tokens_T.data);
  const auto* w = static_cast<const Bf16*>(w_VD.data);
  auto* x = static_cast<Bf16*>(x_TD.data);
#pragma omp parallel for schedule(static) num_threads(ctx.threads)
  for (std::int64_t t = 0; t < T; ++t)
    std::memcpy(x + t * D, w + tokens[t] * D, static_cast<std::size_t>(D) * sizeof(Bf16));
}

// A thread owns columns, so every sum is added by one thread in the order of the tokens.
void embedding_backward(const Context& ctx, const TensorView& tokens_T, const TensorView& dx_TD,
                        const TensorView& dw_VD) {
  constexpr std::int64_t kTile = 64;
  const std::int64_t T = dx_TD.dim(0), D = dx_TD.dim(1);
  const auto* tokens = static_cast<const std::int32_t*>(tokens_T.data);
  const auto* dx = static_cast<const Bf16*>(dx_TD.data);
  auto* dw = static_cast<float*>(dw_VD.data);
#pragma omp parallel for schedule(static) num_threads(ctx.threads)
  for (std::int64_t d0 = 0; d0 < D; d0 += kTile) {
    const std::int64_t end = std::min(D, d0 + kTile);
    for (std::int64_t t = 0; t < T; ++t) {
      float* to = dw + tokens[t] * D;
      const Bf16* from = dx + t * D;
      for (std::int64_t d = d0; d < end; ++d) to[d] = to[d] + numerics::to_float(from[d]);
    }
  }
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA

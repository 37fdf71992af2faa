// CPU implementation of ops/router.h. Arguments are checked by the caller.
#pragma once

#include "ops/cpu/isa.h"
#include "ops/router.h"

namespace lockstep::ops::cpu {

// Scratch of each thread: three rows of E values, padded, and as many keys as experts and groups.
inline std::int64_t router_row(std::int64_t E) { return (E + 31) / 32 * 32; }
inline constexpr int kRouterRows = 3;
inline constexpr std::int64_t kRouterTokenBlock = 128;

struct RouterShape {
  std::int64_t T, E;
  int threads;
  float* rows;          // [threads, kRouterRows, router_row(E)]
  std::uint64_t* keys;  // [threads, E + groups]
};

LOCKSTEP_CPU_DECLARE(void router(const RouterShape& shape, const RouterOptions& options,
                                 const float* logits, const float* bias, float* weights,
                                 std::int32_t* experts);)

LOCKSTEP_CPU_DECLARE(void router_backward(const RouterShape& shape, const RouterOptions& options,
                                          const float* logits, const std::int32_t* experts,
                                          const float* d_weights, const float* d_score,
                                          float* d_logits);)

// block_sums: [ceil(T / 128), E].
LOCKSTEP_CPU_DECLARE(void router_mean_scores(const RouterShape& shape, const RouterOptions& options,
                                             const float* logits, double* block_sums, double* sum);)

LOCKSTEP_CPU_DECLARE(void balance_gradient(std::int64_t E, const BalanceFactors& factors,
                                           const std::int32_t* offsets, const double* sum,
                                           float* d_score, double* value);)

}  // namespace lockstep::ops::cpu

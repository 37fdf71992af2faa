// CPU implementation of ops/permute.h. Arguments are checked by the caller.
#pragma once

#include "ops/cpu/isa.h"

namespace lockstep::ops::cpu {

struct RoutedShape {
  std::int64_t T, C, D;
  int threads;
};

// next_E: scratch. offsets and padded_offsets as in Segments.
LOCKSTEP_CPU_DECLARE(void plan_permutation(const std::int32_t* experts, std::int64_t T,
                                           std::int64_t C, std::int64_t E, std::int32_t* offsets,
                                           std::int32_t* padded_offsets, std::int32_t* row,
                                           std::int32_t* token, std::int32_t* next_E);)

LOCKSTEP_CPU_DECLARE(void permute(const RoutedShape& shape, const numerics::Bf16* h,
                                  const std::int32_t* token, numerics::Bf16* out);)

// R = shape.T rows.
LOCKSTEP_CPU_DECLARE(void scatter_rows(const RoutedShape& shape, const numerics::Bf16* from,
                                       const std::int32_t* row, numerics::Bf16* to);)

LOCKSTEP_CPU_DECLARE(void combine(const RoutedShape& shape, const numerics::Bf16* o,
                                  const float* weights, const std::int32_t* row,
                                  const numerics::Bf16* shared, numerics::Bf16* y);)

LOCKSTEP_CPU_DECLARE(void combine_backward(const RoutedShape& shape, const numerics::Bf16* dy,
                                           const numerics::Bf16* o, const float* weights,
                                           const std::int32_t* row, numerics::Bf16* d_o,
                                           float* d_weights);)

LOCKSTEP_CPU_DECLARE(void permute_backward(const RoutedShape& shape, const numerics::Bf16* d_x,
                                           const std::int32_t* row, const numerics::Bf16* first,
                                           const numerics::Bf16* last, numerics::Bf16* d_h);)

}  // namespace lockstep::ops::cpu

// CPU implementation of ops/vocab.h. Arguments are checked by the caller.
#pragma once

#include "ops/cpu/isa.h"
#include "ops/vocab.h"

namespace lockstep::ops::cpu {

// Scratch of the filters: a key and a weight of each token, for each thread; null where no row
// filters.
struct VocabScratch {
  std::uint32_t* keys;     // [threads, V]
  std::uint64_t* weights;  // [threads, V]
};

// tokens[r] is read where `draw` is false, written where it is true.
LOCKSTEP_CPU_DECLARE(void vocab_rows(int threads, const float* logits, std::int64_t R,
                                     std::int64_t V, const RowSampling* sampling, bool draw,
                                     const VocabScratch& scratch, std::int32_t* tokens,
                                     RowStats* stats);)

LOCKSTEP_CPU_DECLARE(void vocab_backward(int threads, const float* logits, std::int64_t R,
                                         std::int64_t V, const std::int32_t* targets,
                                         const RowSampling* sampling, const RowStats* stats,
                                         const float* g, numerics::Bf16* d_logits);)

}  // namespace lockstep::ops::cpu

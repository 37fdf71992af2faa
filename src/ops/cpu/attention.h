// The CPU's attention. Pointers and sizes were checked by ops/attention.cpp.
#pragma once

#include "ops/attention_args.h"
#include "ops/cpu/isa.h"

namespace lockstep::ops::cpu {

LOCKSTEP_CPU_DECLARE(void attention(const tensor::Context& ctx, const AttentionArgs& args);)
LOCKSTEP_CPU_DECLARE(void attention_backward(const tensor::Context& ctx,
                                             const AttentionArgs& args);)

}  // namespace lockstep::ops::cpu

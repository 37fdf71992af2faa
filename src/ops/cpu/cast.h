#pragma once

#include "ops/cpu/isa.h"
#include "ops/operand.h"

namespace lockstep::ops::cpu {

LOCKSTEP_CPU_DECLARE(void cast(const Context& ctx, const TensorView& from, const TensorView& to);)

}  // namespace lockstep::ops::cpu

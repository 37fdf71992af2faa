// Changing the type of values, element by element.
#pragma once

#include "ops/operand.h"

namespace lockstep::ops {

// to[i] = from[i]: BF16 to FP32 (exact) or FP32 to BF16 (to nearest even, NaN becomes 0x7FFF). The
// same count.
void cast(const Context& ctx, const TensorView& from, const TensorView& to);

}  // namespace lockstep::ops

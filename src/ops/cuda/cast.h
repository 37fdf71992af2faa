#pragma once

#include "ops/operand.h"

namespace lockstep::ops::cuda {

void cast(const Context& ctx, const TensorView& from, const TensorView& to);

}  // namespace lockstep::ops::cuda

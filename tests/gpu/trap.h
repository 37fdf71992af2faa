#pragma once

#include "tensor/tensor.h"

namespace lockstep::tensor::test {

// A kernel that traps: whatever the process does with the GPU from then on fails.
void launch_trap(const Context& ctx);

}  // namespace lockstep::tensor::test

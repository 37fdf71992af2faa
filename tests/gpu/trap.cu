#include "gpu/trap.h"
#include "tensor/cuda_check.h"

namespace lockstep::tensor::test {

__global__ void trap_kernel() { asm volatile("trap;"); }

void launch_trap(const Context& ctx) { trap_kernel<<<1, 1, 0, stream_of(ctx)>>>(); }

}  // namespace lockstep::tensor::test

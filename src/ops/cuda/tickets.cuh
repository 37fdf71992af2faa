// Pieces of work handed out in their order by a counter: whatever is on its way at a time lies
// together then, for which the memory is faster (bench/results/2026-11-22-h200-quantizers.md), and
// CTAs end together.
//
// A CTA's first piece is that of its own number. One thread of it takes a ticket for each further
// one until it gets one that is none of the `count` pieces, and from then on no more. So the CTAs
// take `count` tickets in all, after which atomicInc has left the counter at zero again.
#pragma once

namespace lockstep::ops::cuda {

__device__ inline unsigned first_ticket() { return blockIdx.x - gridDim.x; }

// counter: Context::tickets. count > 0. Nothing may use the ticket before the thread can wait for
// memory, not even an addition.
__device__ inline unsigned next_ticket(unsigned* counter, unsigned count) {
  return atomicInc(counter, count - 1);
}

// The piece of work of a ticket; none where it is `count` or more.
__device__ inline unsigned piece_of(unsigned ticket) { return gridDim.x + ticket; }

}  // namespace lockstep::ops::cuda

// Attention whose values are the first columns of the key rows, on a GPU: key widths up to 576,
// value widths up to 512, multiples of 16.
#pragma once

#include "ops/attention_args.h"

namespace lockstep::ops::cuda {

void attention_latent(const Context& ctx, const AttentionArgs& args);
void attention_latent_backward(const Context& ctx, const AttentionArgs& args);

}  // namespace lockstep::ops::cuda

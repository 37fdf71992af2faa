// Attention on a GPU. All launches have sizes from the host bounds of the arguments; counts beyond
// the true ones end at once.
#pragma once

#include "ops/attention_args.h"

namespace lockstep::ops::cuda {

void attention(const Context& ctx, const AttentionArgs& args);
void attention_backward(const Context& ctx, const AttentionArgs& args);
void write_kv(const Context& ctx, const TensorView& k_TJK, const TensorView& v_TJK,
              const TensorView& slots_T, const TensorView& k_cache_RJK,
              const TensorView& v_cache_RJK);

}  // namespace lockstep::ops::cuda

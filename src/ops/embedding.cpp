#include "ops/embedding.h"

#include "ops/cpu/embedding.h"
#include "ops/cuda/call.h"
#include "ops/cuda/embedding.h"

namespace lockstep::ops {

using tensor::DType;
using tensor::require;

namespace {

void require_tokens(const TensorView& tokens_T, std::int64_t T, std::int64_t V) {
  require(tokens_T, DType::kInt32, {T}, "embedding: tokens");
  LOCKSTEP_CHECK(T == 0 || V > 0, "embedding: the vocabulary is empty");
  if (!tokens_T.on_host()) return;
  const auto* tokens = tokens_T.as<std::int32_t>();
  for (std::int64_t t = 0; t < T; ++t)
    LOCKSTEP_CHECK(tokens[t] >= 0 && tokens[t] < V,
                   "embedding: token {} at place {} is outside the vocabulary of {}", tokens[t], t,
                   V);
}

}  // namespace

void embedding(const Context& ctx, const TensorView& tokens_T, const TensorView& w_VD,
               const TensorView& x_TD) {
  require(w_VD, DType::kBf16, {-1, -1}, "embedding: w");
  require(x_TD, DType::kBf16, {-1, w_VD.dim(1)}, "embedding: x");
  require_tokens(tokens_T, x_TD.dim(0), w_VD.dim(0));
  LOCKSTEP_CUDA_CALL(ctx, embedding, ctx, tokens_T, w_VD, x_TD);
  LOCKSTEP_CPU_CALL(ctx, embedding, ctx, tokens_T, w_VD, x_TD);
}

void embedding_backward(const Context& ctx, const TensorView& tokens_T, const TensorView& dx_TD,
                        const TensorView& dw_VD) {
  require(dw_VD, DType::kFp32, {-1, -1}, "embedding_backward: dw");
  require(dx_TD, DType::kBf16, {-1, dw_VD.dim(1)}, "embedding_backward: dx");
  require_tokens(tokens_T, dx_TD.dim(0), dw_VD.dim(0));
  LOCKSTEP_CUDA_CALL(ctx, embedding_backward, ctx, tokens_T, dx_TD, dw_VD);
  LOCKSTEP_CPU_CALL(ctx, embedding_backward, ctx, tokens_T, dx_TD, dw_VD);
}

}  // namespace lockstep::ops

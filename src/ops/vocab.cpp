#include "ops/vocab.h"

#include <cmath>

#include "ops/cpu/vocab.h"
#include "ops/cuda/call.h"
#include "ops/cuda/vocab.h"

namespace lockstep::ops {

namespace {

using numerics::Bf16;
using tensor::DType;

void check_row(const RowSampling& s, std::int64_t r) {
  const bool temperature =
      s.temperature == 0.0f ||
      (s.temperature > 0.0f && std::isfinite(s.temperature) && std::isfinite(1.0f / s.temperature));
  LOCKSTEP_CHECK(temperature, "vocab: row {}: temperature {}", r, s.temperature);
  LOCKSTEP_CHECK(!std::isnan(s.top_p) && !std::isnan(s.min_p), "vocab: row {}: top_p {}, min_p {}",
                 r, s.top_p, s.min_p);
}

void check(const TensorView& logits_RV, const TensorView& tokens_R, const RowSampling* sampling) {
  tensor::require(logits_RV, DType::kFp32, {-1, -1}, "vocab: logits_RV");
  const std::int64_t R = logits_RV.dim(0), V = logits_RV.dim(1);
  LOCKSTEP_CHECK(V >= 1 && V <= INT32_MAX, "vocab: vocabulary of {}", V);
  tensor::require(tokens_R, DType::kInt32, {R}, "vocab: tokens_R");
  if (logits_RV.on_host())
    for (std::int64_t r = 0; r < R; ++r) check_row(sampling[r], r);
}

void check_targets(const TensorView& targets_R, std::int64_t V) {
  if (!targets_R.on_host()) return;
  const auto* targets = targets_R.as<std::int32_t>();
  for (std::int64_t r = 0; r < targets_R.dim(0); ++r)
    LOCKSTEP_CHECK(targets[r] >= 0 && targets[r] < V, "vocab: row {}: target {} outside [0, {})", r,
                   targets[r], V);
}

bool any_filter(const RowSampling* sampling, std::int64_t R) {
  for (std::int64_t r = 0; r < R; ++r)
    if (sampling[r].min_p > 0.0f || sampling[r].top_k > 0 || sampling[r].top_p < 1.0f) return true;
  return false;
}

void rows(const Context& ctx, const TensorView& logits_RV, const RowSampling* sampling, bool draw,
          const TensorView& tokens_R, RowStats* stats) {
  LOCKSTEP_CUDA_CALL(ctx, vocab_rows, ctx, logits_RV, sampling, draw, tokens_R, stats);
  const std::int64_t R = logits_RV.dim(0), V = logits_RV.dim(1);
  const tensor::ArenaScope scope(*ctx.workspace);
  const std::int64_t size = any_filter(sampling, R) ? ctx.threads * V : 0;
  const TensorView keys = ctx.workspace->take(DType::kInt32, {size});
  const TensorView weights = ctx.workspace->take(DType::kInt64, {size});
  const cpu::VocabScratch scratch{static_cast<std::uint32_t*>(keys.data),
                                  static_cast<std::uint64_t*>(weights.data)};
  LOCKSTEP_CPU_CALL(ctx, vocab_rows, ctx.threads, logits_RV.as<float>(), R, V, sampling, draw,
                    scratch, tokens_R.as<std::int32_t>(), stats);
}

}  // namespace

void vocab_logprobs(const Context& ctx, const TensorView& logits_RV, const TensorView& targets_R,
                    const RowSampling* sampling, RowStats* stats) {
  check(logits_RV, targets_R, sampling);
  check_targets(targets_R, logits_RV.dim(1));
  rows(ctx, logits_RV, sampling, false, targets_R, stats);
}

void vocab_sample(const Context& ctx, const TensorView& logits_RV, const RowSampling* sampling,
                  const TensorView& tokens_R, RowStats* stats) {
  check(logits_RV, tokens_R, sampling);
  rows(ctx, logits_RV, sampling, true, tokens_R, stats);
}

void vocab_backward(const Context& ctx, const TensorView& logits_RV, const TensorView& targets_R,
                    const RowSampling* sampling, const RowStats* stats, const TensorView& g_R,
                    const TensorView& d_logits_RV) {
  check(logits_RV, targets_R, sampling);
  const std::int64_t R = logits_RV.dim(0), V = logits_RV.dim(1);
  check_targets(targets_R, V);
  tensor::require(g_R, DType::kFp32, {R}, "vocab_backward: g_R");
  tensor::require(d_logits_RV, DType::kBf16, {R, V}, "vocab_backward: d_logits_RV");
  LOCKSTEP_CUDA_CALL(ctx, vocab_backward, ctx, logits_RV, targets_R, sampling, stats, g_R,
                     d_logits_RV);
  LOCKSTEP_CPU_CALL(ctx, vocab_backward, ctx.threads, logits_RV.as<float>(), R, V,
                    targets_R.as<std::int32_t>(), sampling, stats, g_R.as<float>(),
                    d_logits_RV.as<Bf16>());
}

}  // namespace lockstep::ops

#include "policy/head.h"

#include <algorithm>

#include "ops/gemm.h"
#include "ops/permute.h"
#include "tensor/device.h"

namespace lockstep::policy {

using model::ModelView;
using ops::RowSampling;
using ops::RowStats;
using tensor::ArenaScope;
using tensor::Context;
using tensor::Device;
using tensor::DType;
using tensor::TensorView;

namespace {

// Chunks whose gradients of the logits exist at a time: the weight's gradient, which is larger, is
// read and written once for all of them.
constexpr std::int64_t kChunksOfGradients = 4;

// Logits of a chunk's hidden states.
TensorView chunk_logits(const Context& ctx, const ModelView& model, const TensorView& hidden_RD) {
  const TensorView logits_RV =
      ctx.workspace->take(DType::kFp32, {hidden_RD.dim(0), model.weights->config.vocab_size});
  model::head_logits(ctx, model, hidden_RD, logits_RV);
  return logits_RV;
}

// hidden_TD's rows rows_R.
TensorView chosen_rows(const Context& ctx, const TensorView& hidden_TD, const TensorView& rows_R) {
  const TensorView hidden_RD = ctx.workspace->take(DType::kBf16, {rows_R.dim(0), hidden_TD.dim(1)});
  ops::permute(ctx, hidden_TD, rows_R, hidden_RD);
  return hidden_RD;
}

}  // namespace

HeadRows make_head_rows(const Context& ctx, tensor::Arena& arena,
                        const std::vector<std::int32_t>& row_R,
                        const std::vector<std::int32_t>& target_R, const RowSampling& sampling) {
  const std::vector<RowSampling> same(std::min<std::size_t>(row_R.size(), numerics::kHeadChunk),
                                      sampling);
  auto* on_device =
      tensor::take_structs<RowSampling>(arena, static_cast<std::int64_t>(same.size()));
  tensor::copy_bytes(ctx, same.data(), Device::kCpu, on_device, ctx.device,
                     same.size() * sizeof(RowSampling));
  return {tensor::upload<std::int32_t>(ctx, arena, row_R),
          tensor::upload<std::int32_t>(ctx, arena, target_R), on_device,
          tensor::take_structs<RowStats>(arena, static_cast<std::int64_t>(row_R.size()))};
}

std::vector<RowStats> head_forward(const Context& ctx, const ModelView& model,
                                   const TensorView& hidden_TD, const HeadRows& rows) {
  for (std::int64_t begin = 0; begin < rows.count(); begin += numerics::kHeadChunk) {
    ArenaScope scratch(*ctx.workspace);
    const std::int64_t count = std::min<std::int64_t>(numerics::kHeadChunk, rows.count() - begin);
    const TensorView hidden_RD = chosen_rows(ctx, hidden_TD, rows.rows_R.rows(begin, count));
    ops::vocab_logprobs(ctx, chunk_logits(ctx, model, hidden_RD), rows.targets_R.rows(begin, count),
                        rows.sampling, rows.stats + begin);
  }
  std::vector<RowStats> stats(static_cast<std::size_t>(rows.count()));
  tensor::copy_bytes(ctx, rows.stats, ctx.device, stats.data(), Device::kCpu,
                     stats.size() * sizeof(RowStats));
  return stats;
}

void head_backward(const Context& ctx, const ModelView& model, const TensorView& hidden_TD,
                   const HeadRows& rows, const std::vector<float>& g_R,
                   const TensorView& d_hidden_TD, const Gradients& grads) {
  const model::ModelConfig& c = model.weights->config;
  const int p = model.weights->table.head;
  const TensorView w = model.weights->view(p).reshape({1, c.vocab_size, c.hidden_size});
  const TensorView dw =
      grads.view(model.weights->table, p).reshape({1, c.vocab_size, c.hidden_size});
  if (rows.count() == 0 && !grads.accumulate) tensor::fill_bytes(ctx, dw, 0);
  tensor::fill_bytes(ctx, d_hidden_TD, 0);
  ArenaScope outer(*ctx.workspace);
  const TensorView g = tensor::upload<float>(ctx, *ctx.workspace, g_R);
  constexpr std::int64_t kRows = kChunksOfGradients * numerics::kHeadChunk;
  for (std::int64_t begin = 0; begin < rows.count(); begin += kRows) {
    ArenaScope scratch(*ctx.workspace);
    const std::int64_t count = std::min(kRows, rows.count() - begin);
    const TensorView rows_R = rows.rows_R.rows(begin, count),
                     hidden_RD = chosen_rows(ctx, hidden_TD, rows_R);
    const TensorView d_logits_RV = ctx.workspace->take(DType::kBf16, {count, c.vocab_size});
    for (std::int64_t at = 0; at < count; at += numerics::kHeadChunk) {
      ArenaScope chunk(*ctx.workspace);
      const std::int64_t r = begin + at,
                         n = std::min<std::int64_t>(numerics::kHeadChunk, count - at);
      ops::vocab_backward(ctx, chunk_logits(ctx, model, hidden_RD.rows(at, n)),
                          rows.targets_R.rows(r, n), rows.sampling, rows.stats + r, g.rows(r, n),
                          d_logits_RV.rows(at, n));
    }
    const TensorView d_hidden_RD = ctx.workspace->take(DType::kBf16, {count, c.hidden_size});
    ops::bf16_gemm(ctx, d_logits_RV, w, ops::BLayout::kKN, {}, d_hidden_RD);
    ops::bf16_weight_gradient(ctx, d_logits_RV, hidden_RD, {}, grads.accumulate || begin > 0, dw,
                              numerics::kHeadChunk);
    ops::scatter_rows(ctx, d_hidden_RD, rows_R, d_hidden_TD);
  }
}

}  // namespace lockstep::policy

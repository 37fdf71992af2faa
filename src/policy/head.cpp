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

// Rows [begin, begin + count) of the head's rows, with their hidden states and logits.
struct Chunk {
  std::int64_t begin, count;
  TensorView rows_R, targets_R, hidden_RD, logits_RV;
};

Chunk load_chunk(const Context& ctx, const ModelView& model, const TensorView& hidden_TD,
                 const HeadRows& rows, std::int64_t begin) {
  const model::ModelConfig& c = model.weights->config;
  const std::int64_t count = std::min<std::int64_t>(numerics::kHeadChunk, rows.count() - begin);
  Chunk chunk{begin,
              count,
              rows.rows_R.rows(begin, count),
              rows.targets_R.rows(begin, count),
              ctx.workspace->take(DType::kBf16, {count, c.hidden_size}),
              ctx.workspace->take(DType::kFp32, {count, c.vocab_size})};
  ops::permute(ctx, hidden_TD, chunk.rows_R, chunk.hidden_RD);
  model::head_logits(ctx, model, chunk.hidden_RD, chunk.logits_RV);
  return chunk;
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
    const Chunk chunk = load_chunk(ctx, model, hidden_TD, rows, begin);
    ops::vocab_logprobs(ctx, chunk.logits_RV, chunk.targets_R, rows.sampling, rows.stats + begin);
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
  for (std::int64_t begin = 0; begin < rows.count(); begin += numerics::kHeadChunk) {
    ArenaScope scratch(*ctx.workspace);
    const Chunk chunk = load_chunk(ctx, model, hidden_TD, rows, begin);
    const TensorView offsets = model::dense_segments(ctx, *ctx.workspace, chunk.count).offsets_E1;
    const TensorView d_logits_RV = ctx.workspace->take(DType::kBf16, {chunk.count, c.vocab_size});
    const TensorView d_hidden_RD = ctx.workspace->take(DType::kBf16, {chunk.count, c.hidden_size});
    ops::vocab_backward(ctx, chunk.logits_RV, chunk.targets_R, rows.sampling, rows.stats + begin,
                        g.rows(begin, chunk.count), d_logits_RV);
    ops::bf16_gemm(ctx, d_logits_RV, w, ops::BLayout::kKN, {}, d_hidden_RD);
    ops::bf16_weight_gradient(ctx, d_logits_RV, chunk.hidden_RD, offsets,
                              grads.accumulate || begin > 0, dw);
    ops::scatter_rows(ctx, d_hidden_RD, chunk.rows_R, d_hidden_TD);
  }
}

}  // namespace lockstep::policy

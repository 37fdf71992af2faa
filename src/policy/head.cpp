#include "policy/head.h"

#include <algorithm>
#include <cstring>

#include "ops/gemm.h"
#include "ops/permute.h"

namespace lockstep::policy {

using model::ModelView;
using ops::RowSampling;
using ops::RowStats;
using tensor::ArenaScope;
using tensor::Context;
using tensor::DType;
using tensor::TensorView;

namespace {

// Rows [begin, begin + count) of the head's rows: their hidden states and targets on the device,
// and their logits.
struct Chunk {
  TensorView rows_R, targets_R, hidden_RD, logits_RV;
};

Chunk load_chunk(const Context& ctx, const ModelView& model, const TensorView& hidden_TD,
                 const std::vector<std::int32_t>& row_R, const std::vector<std::int32_t>& target_R,
                 std::int64_t begin, std::int64_t count) {
  const model::ModelConfig& c = model.weights->config;
  tensor::Arena& arena = *ctx.workspace;
  Chunk chunk{arena.take(DType::kInt32, {count}), arena.take(DType::kInt32, {count}),
              arena.take(DType::kBf16, {count, c.hidden_size}),
              arena.take(DType::kFp32, {count, c.vocab_size})};
  std::memcpy(chunk.rows_R.data, row_R.data() + begin, count * sizeof(std::int32_t));
  std::memcpy(chunk.targets_R.data, target_R.data() + begin, count * sizeof(std::int32_t));
  ops::permute(ctx, hidden_TD, chunk.rows_R, chunk.hidden_RD);
  model::head_logits(ctx, model, chunk.hidden_RD, chunk.logits_RV);
  return chunk;
}

}  // namespace

std::vector<RowStats> head_forward(const Context& ctx, const ModelView& model,
                                   const TensorView& hidden_TD,
                                   const std::vector<std::int32_t>& row_R,
                                   const std::vector<std::int32_t>& target_R,
                                   const RowSampling& sampling) {
  const auto R = static_cast<std::int64_t>(row_R.size());
  std::vector<RowStats> stats(row_R.size());
  const std::vector<RowSampling> rows(std::min<std::size_t>(row_R.size(), numerics::kHeadChunk),
                                      sampling);
  for (std::int64_t begin = 0; begin < R; begin += numerics::kHeadChunk) {
    ArenaScope scratch(*ctx.workspace);
    const std::int64_t count = std::min<std::int64_t>(numerics::kHeadChunk, R - begin);
    const Chunk chunk = load_chunk(ctx, model, hidden_TD, row_R, target_R, begin, count);
    ops::vocab_logprobs(ctx, chunk.logits_RV, chunk.targets_R, rows.data(), stats.data() + begin);
  }
  return stats;
}

void head_backward(const Context& ctx, const ModelView& model, const TensorView& hidden_TD,
                   const std::vector<std::int32_t>& row_R,
                   const std::vector<std::int32_t>& target_R, const RowSampling& sampling,
                   const std::vector<RowStats>& stats, const std::vector<float>& g_R,
                   const TensorView& d_hidden_TD, const TensorView& grads) {
  const model::ModelConfig& c = model.weights->config;
  const auto R = static_cast<std::int64_t>(row_R.size());
  const int p = model.weights->table.head;
  const TensorView w = model.weights->view(p).reshape({1, c.vocab_size, c.hidden_size});
  const TensorView dw =
      model::param_view(model.weights->table, grads, p).reshape({1, c.vocab_size, c.hidden_size});
  const std::vector<RowSampling> rows(std::min<std::size_t>(row_R.size(), numerics::kHeadChunk),
                                      sampling);
  std::memset(d_hidden_TD.data, 0, d_hidden_TD.bytes());
  for (std::int64_t begin = 0; begin < R; begin += numerics::kHeadChunk) {
    ArenaScope scratch(*ctx.workspace);
    tensor::Arena& arena = *ctx.workspace;
    const std::int64_t count = std::min<std::int64_t>(numerics::kHeadChunk, R - begin);
    const Chunk chunk = load_chunk(ctx, model, hidden_TD, row_R, target_R, begin, count);
    const TensorView g = arena.take(DType::kFp32, {count}),
                     offsets = arena.take(DType::kInt32, {2});
    const TensorView d_logits_RV = arena.take(DType::kBf16, {count, c.vocab_size});
    const TensorView d_hidden_RD = arena.take(DType::kBf16, {count, c.hidden_size});
    std::memcpy(g.data, g_R.data() + begin, count * sizeof(float));
    offsets.as<std::int32_t>()[0] = 0,
    offsets.as<std::int32_t>()[1] = static_cast<std::int32_t>(count);
    ops::vocab_backward(ctx, chunk.logits_RV, chunk.targets_R, rows.data(), stats.data() + begin, g,
                        d_logits_RV);
    ops::bf16_gemm(ctx, d_logits_RV, w, ops::BLayout::kKN, {}, d_hidden_RD);
    ops::bf16_weight_gradient(ctx, d_logits_RV, chunk.hidden_RD, offsets, true, dw);
    const std::size_t row_bytes = static_cast<std::size_t>(c.hidden_size) * sizeof(numerics::Bf16);
    for (std::int64_t r = 0; r < count; ++r)
      std::memcpy(static_cast<std::byte*>(d_hidden_TD.data) + row_R[begin + r] * row_bytes,
                  static_cast<const std::byte*>(d_hidden_RD.data) + r * row_bytes, row_bytes);
  }
}

}  // namespace lockstep::policy

#include "rollout/batch.h"

#include <algorithm>
#include <numeric>

#include "ops/attention.h"
#include "ops/permute.h"
#include "tensor/device.h"

namespace lockstep::rollout {

using tensor::ArenaScope;
using tensor::Context;
using tensor::Device;
using tensor::DType;
using tensor::TensorView;

namespace {

constexpr std::int64_t kMaxLogits = std::int64_t{1} << 24;

// Logits of draws [begin, begin + count). Draws of one item are neighbours.
TensorView draw_logits(const Context& ctx, const model::ModelView& model, const StepPlan& plan,
                       const std::vector<std::int32_t>& last_row, const TensorView& hidden_TD,
                       std::int64_t begin, std::int64_t count) {
  const std::int64_t V = model.weights->config.vocab_size;
  tensor::Arena& arena = *ctx.workspace;
  std::vector<std::int32_t> rows;
  std::vector<std::int64_t> distinct(count);  // draw -> row of logits_UV
  for (std::int64_t r = 0; r < count; ++r) {
    const Draw& draw = plan.draws[begin + r];
    if (r == 0 || draw.item != plan.draws[begin + r - 1].item) rows.push_back(last_row[draw.item]);
    distinct[r] = static_cast<std::int64_t>(rows.size()) - 1;
  }
  const auto U = static_cast<std::int64_t>(rows.size());
  const TensorView hidden_UD = arena.take(DType::kBf16, {U, hidden_TD.dim(1)});
  ops::permute(ctx, hidden_TD, tensor::upload<std::int32_t>(ctx, arena, rows), hidden_UD);
  const TensorView logits_UV = arena.take(DType::kFp32, {U, V});
  model::head_logits(ctx, model, hidden_UD, logits_UV);
  if (U == count) return logits_UV;
  const TensorView logits_RV = arena.take(DType::kFp32, {count, V});
  for (std::int64_t r = 0; r < count; ++r)
    tensor::copy(ctx, logits_UV.rows(distinct[r], 1), logits_RV.rows(r, 1));
  return logits_RV;
}

}  // namespace

ops::RowSampling row_sampling(const Sequence& sequence) {
  const Request& r = sequence.request;
  ops::RowSampling s;
  s.temperature = r.sampling.temperature;
  s.top_k = r.sampling.top_k;
  s.top_p = r.sampling.top_p;
  s.min_p = r.sampling.min_p;
  s.seed = r.seed;
  s.stream = r.stream;
  s.position = static_cast<std::uint32_t>(sequence.response_length());
  return s;
}

void sample_rows(const Context& ctx, const model::ModelView& model, const TensorView& hidden_UD,
                 const ops::RowSampling* sampling, const TensorView& tokens_U,
                 ops::RowStats* stats) {
  const std::int64_t U = hidden_UD.dim(0), V = model.weights->config.vocab_size;
  const std::int64_t chunk = std::max<std::int64_t>(1, kMaxLogits / V);
  for (std::int64_t begin = 0; begin < U; begin += chunk) {
    const ArenaScope scratch(*ctx.workspace);
    const std::int64_t count = std::min(chunk, U - begin);
    const TensorView logits_UV = ctx.workspace->take(DType::kFp32, {count, V});
    model::head_logits(ctx, model, hidden_UD.rows(begin, count), logits_UV);
    ops::vocab_sample(ctx, logits_UV, sampling + begin, tokens_U.rows(begin, count), stats + begin);
  }
}

model::ForwardBatch make_batch(const Context& ctx, const StepPlan& plan, int block_size) {
  const std::int64_t T = plan.tokens, S = static_cast<std::int64_t>(plan.items.size());
  std::int64_t P = 0;
  model::ForwardBatch batch;
  for (const StepItem& item : plan.items) {
    P = std::max(P, (item.begin + item.count + block_size - 1) / block_size);
    batch.attention.max_queries = std::max(batch.attention.max_queries, item.count);
    batch.attention.max_keys = std::max(batch.attention.max_keys, item.begin + item.count);
  }
  // All arrays one behind the other: one copy to the device.
  std::vector<std::int32_t> values(static_cast<std::size_t>(3 * T + (S + 1) + S + S * P));
  std::int32_t *tokens = values.data(), *positions = tokens + T, *slots = positions + T,
               *offsets = slots + T, *lengths = offsets + S + 1, *pages = lengths + S;
  std::int32_t t = 0;
  offsets[0] = 0;
  for (std::int64_t s = 0; s < S; ++s) {
    const StepItem& item = plan.items[s];
    const Sequence& sequence = *item.sequence;
    const std::int64_t end = item.begin + item.count;
    for (std::int64_t i = item.begin; i < end; ++i, ++t) {
      tokens[t] = sequence.tokens[i];
      positions[t] = static_cast<std::int32_t>(i);
      slots[t] = cache_row(sequence, i, block_size);
    }
    offsets[s + 1] = t;
    lengths[s] = static_cast<std::int32_t>(end);
    const std::int64_t used = (end + block_size - 1) / block_size;
    std::copy_n(sequence.pages.begin(), used, pages + s * P);  // zeros behind are never read
  }
  const TensorView all = tensor::upload<std::int32_t>(ctx, *ctx.workspace, values);
  std::int64_t at = 0;
  const auto next = [&](const tensor::Shape& shape) {
    const TensorView view = all.rows(at, shape.count()).reshape(shape);
    at += shape.count();
    return view;
  };
  batch.tokens_T = next({T});
  batch.positions_T = next({T});
  batch.slots_T = next({T});
  batch.attention.q_offsets_S1 = next({S + 1});
  batch.attention.kv_lengths_S = next({S});
  batch.attention.pages_SP = next({S, P});
  batch.attention.page_size = block_size;
  return batch;
}

void copy_pages(const Context& ctx, const StepPlan& plan, int block_size, model::KvCache& cache) {
  for (const PageCopy& copy : plan.copies) {
    ArenaScope scratch(*ctx.workspace);
    std::vector<std::int32_t> rows(static_cast<std::size_t>(copy.rows));
    std::iota(rows.begin(), rows.end(), copy.target * block_size);
    const TensorView slots = tensor::upload<std::int32_t>(ctx, *ctx.workspace, rows);
    const std::int64_t first = std::int64_t{copy.source} * block_size;
    for (std::size_t layer = 0; layer < cache.k.size(); ++layer)
      if (cache.v.empty())  // values lie in the keys
        ops::write_kv(ctx, cache.k[layer].view().rows(first, copy.rows), {}, slots, cache.k[layer],
                      {});
      else
        ops::write_kv(ctx, cache.k[layer].view().rows(first, copy.rows),
                      cache.v[layer].view().rows(first, copy.rows), slots, cache.k[layer],
                      cache.v[layer]);
  }
}

void sample_draws(const Context& ctx, const model::ModelView& model, const StepPlan& plan,
                  const TensorView& hidden_TD, Sampled& out) {
  const auto R = static_cast<std::int64_t>(plan.draws.size());
  const std::int64_t chunk =
      std::max<std::int64_t>(1, kMaxLogits / model.weights->config.vocab_size);
  std::vector<std::int32_t> last_row;  // by item
  last_row.reserve(plan.items.size());
  std::int64_t t = 0;
  for (const StepItem& item : plan.items)
    last_row.push_back(static_cast<std::int32_t>((t += item.count) - 1));
  std::vector<ops::RowSampling> sampling;
  sampling.reserve(R);
  for (const Draw& draw : plan.draws) sampling.push_back(row_sampling(*draw.sequence));
  out.tokens.resize(R);
  out.stats.resize(R);
  for (std::int64_t begin = 0; begin < R; begin += chunk) {
    ArenaScope scratch(*ctx.workspace);
    const std::int64_t count = std::min(chunk, R - begin);
    const TensorView logits_RV = draw_logits(ctx, model, plan, last_row, hidden_TD, begin, count);
    auto* stats = tensor::take_structs<ops::RowStats>(*ctx.workspace, count);
    const TensorView tokens_R = ctx.workspace->take(DType::kInt32, {count});
    auto* rows = tensor::take_structs<ops::RowSampling>(*ctx.workspace, count);
    tensor::copy_bytes(ctx, sampling.data() + begin, Device::kCpu, rows, ctx.device,
                       static_cast<std::size_t>(count) * sizeof(ops::RowSampling));
    ops::vocab_sample(ctx, logits_RV, rows, tokens_R, stats);
    tensor::copy_bytes(ctx, stats, ctx.device, out.stats.data() + begin, Device::kCpu,
                       static_cast<std::size_t>(count) * sizeof(ops::RowStats));
    tensor::download(ctx, tokens_R, out.tokens.data() + begin);
  }
}

}  // namespace lockstep::rollout

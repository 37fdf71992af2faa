#include "rollout/batch.h"

#include <algorithm>
#include <cstring>

#include "ops/attention.h"
#include "ops/permute.h"

namespace lockstep::rollout {

using tensor::ArenaScope;
using tensor::Context;
using tensor::DType;
using tensor::TensorView;

namespace {

constexpr std::int64_t kMaxLogits = std::int64_t{1} << 24;

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

// Logits of draws [begin, begin + count). Draws of one item are neighbours.
TensorView draw_logits(const Context& ctx, const model::ModelView& model, const StepPlan& plan,
                       const std::vector<std::int32_t>& last_row, const TensorView& hidden_TD,
                       std::int64_t begin, std::int64_t count) {
  const std::int64_t V = model.weights->config.vocab_size;
  tensor::Arena& arena = *ctx.workspace;
  const TensorView rows_R = arena.take(DType::kInt32, {count});
  std::vector<std::int64_t> distinct(count);  // draw -> row of logits_UV
  std::int64_t U = 0;
  for (std::int64_t r = 0; r < count; ++r) {
    const Draw& draw = plan.draws[begin + r];
    if (r == 0 || draw.item != plan.draws[begin + r - 1].item)
      rows_R.as<std::int32_t>()[U++] = last_row[draw.item];
    distinct[r] = U - 1;
  }
  const TensorView hidden_UD = arena.take(DType::kBf16, {U, hidden_TD.dim(1)});
  ops::permute(ctx, hidden_TD, rows_R.rows(0, U), hidden_UD);
  const TensorView logits_UV = arena.take(DType::kFp32, {U, V});
  model::head_logits(ctx, model, hidden_UD, logits_UV);
  if (U == count) return logits_UV;
  const TensorView logits_RV = arena.take(DType::kFp32, {count, V});
  for (std::int64_t r = 0; r < count; ++r)
    std::memcpy(logits_RV.as<float>() + r * V, logits_UV.as<float>() + distinct[r] * V,
                static_cast<std::size_t>(V) * sizeof(float));
  return logits_RV;
}

}  // namespace

model::ForwardBatch make_batch(const Context& ctx, const StepPlan& plan, int block_size) {
  tensor::Arena& arena = *ctx.workspace;
  const std::int64_t T = plan.tokens, S = static_cast<std::int64_t>(plan.items.size());
  std::int64_t P = 0;
  for (const StepItem& item : plan.items)
    P = std::max(P, (item.begin + item.count + block_size - 1) / block_size);
  const auto take = [&](const tensor::Shape& shape) { return arena.take(DType::kInt32, shape); };
  model::ForwardBatch batch;
  batch.tokens_T = take({T});
  batch.positions_T = take({T});
  batch.slots_T = take({T});
  batch.attention = {take({S + 1}), take({S}), take({S, P}), block_size};
  auto *tokens = batch.tokens_T.as<std::int32_t>(),
       *positions = batch.positions_T.as<std::int32_t>(), *slots = batch.slots_T.as<std::int32_t>(),
       *offsets = batch.attention.q_offsets_S1.as<std::int32_t>(),
       *lengths = batch.attention.kv_lengths_S.as<std::int32_t>(),
       *pages = batch.attention.pages_SP.as<std::int32_t>();
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
    std::copy_n(sequence.pages.begin(), used, pages + s * P);
    std::fill_n(pages + s * P + used, P - used, 0);  // never read
  }
  return batch;
}

void copy_pages(const Context& ctx, const StepPlan& plan, int block_size, model::KvCache& cache) {
  for (const PageCopy& copy : plan.copies) {
    ArenaScope scratch(*ctx.workspace);
    const TensorView slots = ctx.workspace->take(DType::kInt32, {copy.rows});
    for (std::int64_t row = 0; row < copy.rows; ++row)
      slots.as<std::int32_t>()[row] =
          static_cast<std::int32_t>(std::int64_t{copy.target} * block_size + row);
    const std::int64_t first = std::int64_t{copy.source} * block_size;
    for (std::size_t layer = 0; layer < cache.k.size(); ++layer)
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
    const TensorView tokens_R = ctx.workspace->take(DType::kInt32, {count});
    ops::vocab_sample(ctx, logits_RV, sampling.data() + begin, tokens_R, out.stats.data() + begin);
    std::memcpy(out.tokens.data() + begin, tokens_R.data, tokens_R.bytes());
  }
}

}  // namespace lockstep::rollout

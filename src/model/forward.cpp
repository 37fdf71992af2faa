// T packed tokens, D model width, H query heads, J KV heads, K head width, E experts, C chosen per
// token, M routed rows, F padded width of an expert or dense MLP, N rows of the fused q|k|v slab.
#include "model/forward.h"

#include "model/operands.h"
#include "model/rope.h"
#include "ops/embedding.h"
#include "ops/gemm.h"
#include "ops/norm.h"
#include "tensor/device.h"

namespace lockstep::model {

using ops::QuantStats;
using ops::Segments;
using tensor::Arena;
using tensor::ArenaScope;
using tensor::Context;
using tensor::DType;
using tensor::Shape;
using tensor::TensorView;

// Computed on the CPU for every device: the C library's pow, sin and cos decide the last bits.
RopeTables make_rope_tables(const Context& ctx, const ModelConfig& config) {
  const Shape shape{config.max_positions, config.head_dim / 2};
  const RopeTables host{{tensor::Device::kCpu, DType::kFp32, shape},
                        {tensor::Device::kCpu, DType::kFp32, shape}};
  const RopeFrequencies frequencies = rope_frequencies(config);
  ops::rope_table(frequencies.inverse, frequencies.factor, host.cos_PK, host.sin_PK);
  if (ctx.device == tensor::Device::kCpu) return host;
  RopeTables tables{{ctx.device, DType::kFp32, shape}, {ctx.device, DType::kFp32, shape}};
  tensor::copy(ctx, host.cos_PK, tables.cos_PK);
  tensor::copy(ctx, host.sin_PK, tables.sin_PK);
  return tables;
}

Segments dense_segments(const Context& ctx, Arena& arena, std::int64_t rows) {
  const std::int32_t offsets[] = {0, static_cast<std::int32_t>(rows)},
                     padded[] = {0, static_cast<std::int32_t>(padded_capacity(rows, 1))};
  return {tensor::upload<std::int32_t>(ctx, arena, offsets),
          tensor::upload<std::int32_t>(ctx, arena, padded)};
}

PassCounters take_counters(const Context& ctx, Arena& arena, const ModelConfig& c) {
  PassCounters p;
  const TensorView stats =
      arena.take(DType::kInt64, {kStatGroups * std::int64_t{sizeof(QuantStats)} / 8});
  static_assert(sizeof(QuantStats) % 8 == 0);
  p.stats = static_cast<QuantStats*>(stats.data);
  p.offsets_LE = arena.take(DType::kInt32, {c.num_layers, c.num_experts + 1});
  tensor::fill_bytes(ctx, stats, 0);
  tensor::fill_bytes(ctx, p.offsets_LE, 0);
  return p;
}

ForwardStats read_counters(const Context& ctx, const PassCounters& counters) {
  QuantStats groups[kStatGroups];
  tensor::copy_bytes(ctx, counters.stats, ctx.device, groups, tensor::Device::kCpu, sizeof(groups));
  const std::int64_t L = counters.offsets_LE.dim(0), E = counters.offsets_LE.dim(1) - 1;
  std::vector<std::int32_t> offsets(static_cast<std::size_t>(L * (E + 1)));
  tensor::download(ctx, counters.offsets_LE, offsets.data());
  ForwardStats s{groups[kAttentionInput],
                 groups[kAttentionOutput],
                 groups[kExpertInput],
                 groups[kExpertActivation],
                 {}};
  for (std::int64_t l = 0; l < L; ++l)
    for (std::int64_t e = 0; e < E; ++e)
      s.expert_rows.push_back(offsets[l * (E + 1) + e + 1] - offsets[l * (E + 1) + e]);
  return s;
}

std::size_t KvCache::bytes() const {
  std::size_t sum = 0;
  for (const auto* tensors : {&k, &v})
    for (const tensor::Tensor& t : *tensors) sum += t.view().bytes();
  return sum;
}

static Shape kv_shape(const ModelConfig& c, std::int64_t rows) {
  if (is_latent(c)) return {rows, 1, c.latent.kv_rank + c.head_dim};
  return {rows, c.num_kv_heads, c.head_dim};
}

std::int64_t kv_row_bytes(const ModelConfig& c) {
  return c.num_layers * kv_shape(c, 1).count() * (is_latent(c) ? 2 : 4);
}

KvCache make_kv_cache(const Context& ctx, const ModelConfig& c, std::int64_t rows) {
  KvCache cache;
  for (std::int64_t layer = 0; layer < c.num_layers; ++layer) {
    cache.k.emplace_back(ctx.device, DType::kBf16, kv_shape(c, rows));
    if (!is_latent(c)) cache.v.emplace_back(ctx.device, DType::kBf16, kv_shape(c, rows));
  }
  return cache;
}

bool cache_fits(const KvCache& cache, const ModelConfig& c, std::int64_t rows) {
  return static_cast<std::int64_t>(cache.k.size()) == c.num_layers &&
         cache.k[0].view().shape == kv_shape(c, rows) && cache.v.empty() == is_latent(c);
}

void ForwardStats::add(const ForwardStats& other) {
  attention_input.add(other.attention_input);
  attention_output.add(other.attention_output);
  expert_input.add(other.expert_input);
  expert_activation.add(other.expert_activation);
  if (expert_rows.size() < other.expert_rows.size()) expert_rows.resize(other.expert_rows.size());
  for (std::size_t i = 0; i < other.expert_rows.size(); ++i) expert_rows[i] += other.expert_rows[i];
}

void forward(const Context& ctx, const ModelView& model, const ForwardBatch& batch, KvCache* cache,
             ForwardSink* sink, const TensorView& hidden_TD) {
  const ModelConfig& c = model.weights->config;
  const ParamTable& table = model.weights->table;
  const std::int64_t T = batch.tokens_T.dim(0), D = c.hidden_size;
  tensor::require(hidden_TD, DType::kBf16, {T, D}, "forward: hidden");
  ArenaScope scratch(*ctx.workspace);
  Arena& keep = sink != nullptr ? *sink->arena : *ctx.workspace;
  const auto take = [&] { return keep.take(DType::kBf16, {T, D}); };

  Segments dense;
  TensorView x_TD = take(), delta_TD;
  ops::embedding(ctx, batch.tokens_T, model.weights->view(table.embedding), x_TD);
  if (sink != nullptr) {
    sink->dense = dense = dense_segments(ctx, keep, T);
    sink->counters = take_counters(ctx, keep, c);
    sink->layers.assign(static_cast<std::size_t>(c.num_layers), {});
  }
  for (int l = 0; l < c.num_layers; ++l) {
    // A backward wants every layer's; without one a layer writes over its input.
    const TensorView x_out = sink != nullptr ? take() : x_TD;
    const TensorView delta_out = sink != nullptr || !delta_TD ? take() : delta_TD;
    LayerSaved* saved = sink != nullptr && !sink->recompute ? &sink->layers[l] : nullptr;
    forward_layer(ctx, model, l, batch, cache, x_TD, delta_TD, dense, saved, &keep,
                  sink != nullptr ? sink->counters : PassCounters{}, x_out, delta_out);
    if (sink != nullptr) sink->layers[l].x_in_TD = x_TD, sink->layers[l].delta_in_TD = delta_TD;
    x_TD = x_out, delta_TD = delta_out;
  }
  const TensorView x_final = take(), rstd = keep.take(DType::kFp32, {T});
  ops::rms_norm(ctx, x_TD, delta_TD, model.weights->view(table.final_norm), c.rms_eps, x_final,
                hidden_TD, rstd);
  if (sink != nullptr)
    sink->x_final_TD = x_final, sink->rstd_final_T = rstd, sink->hidden_TD = hidden_TD;
}

void head_logits(const Context& ctx, const ModelView& model, const TensorView& hidden_RD,
                 const TensorView& logits_RV) {
  const ModelConfig& c = model.weights->config;
  const TensorView w =
      model.weights->view(model.weights->table.head).reshape({1, c.vocab_size, c.hidden_size});
  ops::bf16_gemm(ctx, hidden_RD, w, ops::BLayout::kNK, {}, logits_RV);
}

}  // namespace lockstep::model

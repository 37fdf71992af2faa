// T packed tokens, D model width, H query heads, J KV heads, K head width, E experts, C chosen per
// token, M routed rows, F padded expert width, N rows of the fused q|k|v slab.
#include "model/forward.h"

#include <cmath>

#include "model/operands.h"
#include "ops/embedding.h"
#include "ops/gemm.h"
#include "ops/norm_quantize.h"
#include "ops/permute_quantize.h"
#include "ops/swiglu.h"
#include "tensor/device.h"

namespace lockstep::model {

using ops::Fp8Columns;
using ops::Fp8Rows;
using ops::QuantStats;
using ops::Segments;
using tensor::Arena;
using tensor::ArenaScope;
using tensor::Context;
using tensor::DType;
using tensor::Shape;
using tensor::TensorView;

namespace {

// What a linear reads: row codes where it runs in FP8, else the BF16 rows. `columns` (may be null)
// receives the column codes for the weight gradient.
struct LinearInput {
  TensorView x_MK;
  Fp8Rows rows;
};

LinearInput linear_input(const Context& ctx, const ModelView& model, int p, const TensorView& x_MK,
                         const Segments& segments, Arena* keep, Fp8Columns* columns,
                         QuantStats* stats) {
  const QuantizedWeights& q = *model.quantized;
  LinearInput in{x_MK, {}};
  if (!q.fp8[p]) return in;
  in.rows = take_rows(*ctx.workspace, x_MK.dim(0), x_MK.dim(1), q.precision.scaling());
  if (columns == nullptr) {
    ops::quantize_rows(ctx, x_MK, q.precision.activation_pow2, in.rows, stats);
    return in;
  }
  *columns =
      take_columns(*keep, x_MK.dim(1), x_MK.dim(0), segments.experts(), q.precision.scaling());
  ops::quantize_rows_columns(ctx, x_MK, segments, q.precision.activation_pow2, in.rows, *columns,
                             stats);
  return in;
}

void linear(const Context& ctx, const ModelView& model, int p, const LinearInput& in,
            const TensorView& offsets_E1, const TensorView& out_MN) {
  if (model.quantized->fp8[p])
    ops::fp8_gemm(ctx, in.rows, model.quantized->forward[p], offsets_E1, out_MN);
  else
    ops::bf16_gemm(ctx, in.x_MK, model.weights->view(p), ops::BLayout::kNK, offsets_E1, out_MN);
}

}  // namespace

// Computed on the CPU for every device: the C library's pow, sin and cos decide the last bits.
RopeTables make_rope_tables(const Context& ctx, const ModelConfig& config) {
  const Shape shape{config.max_positions, config.head_dim / 2};
  const RopeTables host{{tensor::Device::kCpu, DType::kFp32, shape},
                        {tensor::Device::kCpu, DType::kFp32, shape}};
  ops::rope_table(config.rope_theta, host.cos_PK, host.sin_PK);
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

void ForwardStats::add(const ForwardStats& other) {
  attention_input.add(other.attention_input);
  attention_output.add(other.attention_output);
  expert_input.add(other.expert_input);
  expert_activation.add(other.expert_activation);
  if (expert_rows.size() < other.expert_rows.size()) expert_rows.resize(other.expert_rows.size());
  for (std::size_t i = 0; i < other.expert_rows.size(); ++i) expert_rows[i] += other.expert_rows[i];
}

void forward_layer(const Context& ctx, const ModelView& model, int layer, const ForwardBatch& batch,
                   KvCache* cache, const TensorView& x_TD, const TensorView& delta_TD,
                   const Segments& dense, LayerSaved* saved, Arena* keep_arena,
                   const PassCounters& counters, const TensorView& x_out_TD,
                   const TensorView& delta_out_TD) {
  const ModelConfig& c = model.weights->config;
  const ParamTable& table = model.weights->table;
  const LayerParams& p = table.layers[layer];
  const QuantizedWeights& q = *model.quantized;
  const std::int64_t T = x_TD.dim(0), D = c.hidden_size, H = c.num_heads, J = c.num_kv_heads,
                     K = c.head_dim;
  const std::int64_t E = c.num_experts, C = c.router.top_k, M = T * C, F = table.expert_width;
  const TensorView none;
  const auto weight = [&](int i) { return i < 0 ? TensorView{} : model.weights->view(i); };

  ArenaScope scratch(*ctx.workspace);
  LayerSaved local;
  LayerSaved& s = saved != nullptr ? *saved : local;
  Arena& keep = saved != nullptr ? *keep_arena : *ctx.workspace;
  const auto bf16 = [&](const Shape& shape) { return keep.take(DType::kBf16, shape); };
  const auto fp32 = [&](const Shape& shape) { return keep.take(DType::kFp32, shape); };
  const auto int32 = [&](const Shape& shape) { return keep.take(DType::kInt32, shape); };

  // 1. attention: norm, q|k|v, head norm and rotation, cache, softmax(qk)v, output projection
  s.x1_TD = bf16({T, D}), s.rstd1_T = fp32({T});
  LinearInput h1;
  if (q.fp8[p.qkv]) {
    h1.rows = take_rows(*ctx.workspace, T, D, q.precision.scaling());
    if (saved) s.h1_columns = take_columns(keep, D, T, 1, q.precision.scaling());
    ops::rms_norm_quantize(ctx, x_TD, delta_TD, weight(p.input_norm), c.rms_eps, s.x1_TD, none,
                           s.rstd1_T, dense, q.precision.activation_pow2, h1.rows,
                           saved ? &s.h1_columns : nullptr, counters.group(kAttentionInput));
  } else {
    h1.x_MK = s.h1_TD = bf16({T, D});
    ops::rms_norm(ctx, x_TD, delta_TD, weight(p.input_norm), c.rms_eps, s.x1_TD, s.h1_TD,
                  s.rstd1_T);
  }
  s.qkv_TN = bf16({T, table.qkv_rows});
  linear(ctx, model, p.qkv, h1, none, s.qkv_TN);

  s.q_THK = bf16({T, H, K}), s.k_TJK = bf16({T, J, K}), s.v_TJK = bf16({T, J, K});
  if (c.qk_norm) s.q_rstd_TH = fp32({T, H}), s.k_rstd_TJ = fp32({T, J});
  ops::head_norm_rope(ctx, {s.qkv_TN, table.q_column}, weight(p.q_norm), c.rms_eps,
                      batch.positions_T, model.cos_PK, model.sin_PK, s.q_rstd_TH, s.q_THK);
  ops::head_norm_rope(ctx, {s.qkv_TN, table.k_column}, weight(p.k_norm), c.rms_eps,
                      batch.positions_T, model.cos_PK, model.sin_PK, s.k_rstd_TJ, s.k_TJK);
  ops::head_norm_rope(ctx, {s.qkv_TN, table.v_column}, none, c.rms_eps, batch.positions_T, none,
                      none, none, s.v_TJK);

  s.attention_THK = bf16({T, H, K});
  if (saved != nullptr) s.lse2_TH = fp32({T, H});
  const double scale = 1.0 / std::sqrt(static_cast<double>(K));
  if (cache != nullptr) {
    ops::write_kv(ctx, s.k_TJK, s.v_TJK, batch.slots_T, cache->k[layer], cache->v[layer]);
    ops::attention(ctx, s.q_THK, cache->k[layer], cache->v[layer], batch.attention, scale,
                   s.attention_THK, s.lse2_TH);
  } else {
    ops::attention(ctx, s.q_THK, s.k_TJK, s.v_TJK, batch.attention, scale, s.attention_THK,
                   s.lse2_TH);
  }
  const LinearInput a =
      linear_input(ctx, model, p.o, s.attention_THK.reshape({T, H * K}), dense, &keep,
                   saved ? &s.attention_columns : nullptr, counters.group(kAttentionOutput));
  const TensorView o_TD = ctx.workspace->take(DType::kBf16, {T, D});
  linear(ctx, model, p.o, a, none, o_TD);

  // 2. experts: norm, router, permute, gate|up, SwiGLU, down, combine
  s.x2_TD = x_out_TD, s.h2_TD = bf16({T, D}), s.rstd2_T = fp32({T});
  ops::rms_norm(ctx, s.x1_TD, o_TD, weight(p.post_norm), c.rms_eps, s.x2_TD, s.h2_TD, s.rstd2_T);
  s.logits_TE = fp32({T, E}), s.weights_TC = fp32({T, C}), s.experts_TC = int32({T, C});
  ops::bf16_gemm(ctx, s.h2_TD, weight(p.router), ops::BLayout::kNK, none, s.logits_TE);
  const TensorView bias_E = model.weights->router_bias.view().rows(layer, 1).reshape({E});
  ops::router(ctx, s.logits_TE, bias_E, c.router, s.weights_TC, s.experts_TC);
  s.segments = {
      counters.offsets_LE ? counters.offsets_LE.rows(layer, 1).reshape({E + 1}) : int32({E + 1}),
      int32({E + 1})};
  s.row_TC = int32({T, C}), s.token_M = int32({M});
  ops::plan_permutation(ctx, s.experts_TC, s.segments, s.row_TC, s.token_M);
  const TensorView& offsets = s.segments.offsets_E1;

  LinearInput routed;
  if (q.fp8[p.gate_up]) {
    routed.rows = take_rows(*ctx.workspace, M, D, q.precision.scaling());
    if (saved) s.routed_columns = take_columns(keep, D, M, E, q.precision.scaling());
    ops::permute_quantize(ctx, s.h2_TD, s.token_M, s.segments, q.precision.activation_pow2,
                          routed.rows, saved ? &s.routed_columns : nullptr,
                          counters.group(kExpertInput));
  } else {
    routed.x_MK = s.routed_MD = bf16({M, D});
    ops::permute(ctx, s.h2_TD, s.token_M, s.routed_MD);
  }
  s.gate_up_MF = bf16({M, 2 * F});
  linear(ctx, model, p.gate_up, routed, offsets, s.gate_up_MF);

  LinearInput activation;
  if (q.fp8[p.down]) {
    activation.rows = take_rows(*ctx.workspace, M, F, q.precision.scaling());
    if (saved) s.activation_columns = take_columns(keep, F, M, E, q.precision.scaling());
    ops::swiglu_quantize(ctx, s.gate_up_MF, s.segments, q.precision.activation_pow2,
                         activation.rows, saved ? &s.activation_columns : nullptr,
                         counters.group(kExpertActivation));
  } else {
    activation.x_MK = s.activation_MF = bf16({M, F});
    ops::swiglu(ctx, s.gate_up_MF, s.activation_MF);
  }
  s.down_MD = bf16({M, D});
  linear(ctx, model, p.down, activation, offsets, s.down_MD);
  ops::combine(ctx, s.down_MD, s.weights_TC, s.row_TC, none, delta_out_TD);
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

// Shape letters as in model/forward.cpp. d_x is the gradient of x.
#include "policy/backward.h"

#include <algorithm>
#include <cmath>

#include "model/operands.h"
#include "ops/cast.h"
#include "ops/embedding.h"
#include "ops/gemm.h"
#include "ops/norm.h"
#include "ops/permute.h"
#include "ops/router.h"
#include "ops/swiglu.h"
#include "tensor/device.h"

namespace lockstep::policy {

using model::LayerParams;
using model::LayerSaved;
using model::ModelConfig;
using model::ModelView;
using ops::Fp8Columns;
using ops::Fp8Rows;
using ops::QuantStats;
using ops::Scaling;
using ops::Segments;
using tensor::Arena;
using tensor::ArenaScope;
using tensor::Context;
using tensor::DType;
using tensor::Shape;
using tensor::TensorView;

namespace {

// What the forward kept of a linear's input: column codes or BF16 rows.
struct SavedInput {
  TensorView x_MK;
  Fp8Columns columns;
};

// A linear's output gradient in FP8: rows for the input gradient, columns for the weight gradient.
struct Fp8Gradient {
  Fp8Rows rows;
  Fp8Columns columns;
};

Fp8Gradient take_gradient(const Context& ctx, const ModelView& model, std::int64_t M,
                          std::int64_t N, const Segments& segments) {
  const Scaling scaling = model.quantized->precision.scaling();
  return {model::take_rows(*ctx.workspace, M, N, scaling),
          model::take_columns(*ctx.workspace, N, M, segments.experts(), scaling)};
}

// dx = dy W and dW += dy^T x of one (grouped) linear that runs in FP8.
void fp8_linear_backward(const Context& ctx, const ModelView& model, int p, const Fp8Gradient& dy,
                         const SavedInput& x, const Segments& segments,
                         const TensorView& offsets_E1, const TensorView& dx_MK,
                         const TensorView& grads) {
  ops::fp8_gemm(ctx, dy.rows, model.quantized->transposed[p], offsets_E1, dx_MK);
  ops::fp8_weight_gradient(ctx, dy.columns, x.columns, segments, true,
                           model::param_view(model.weights->table, grads, p));
}

// The same from a BF16 gradient, for a linear of either precision.
void linear_backward(const Context& ctx, const ModelView& model, int p, const TensorView& dy_MN,
                     const SavedInput& x, const Segments& segments, const TensorView& offsets_E1,
                     const TensorView& dx_MK, const TensorView& grads, QuantStats* stats) {
  const model::QuantizedWeights& q = *model.quantized;
  if (!q.fp8[p]) {
    ops::bf16_gemm(ctx, dy_MN, model.weights->view(p), ops::BLayout::kKN, offsets_E1, dx_MK);
    ops::bf16_weight_gradient(ctx, dy_MN, x.x_MK, segments.offsets_E1, true,
                              model::param_view(model.weights->table, grads, p));
    return;
  }
  ArenaScope scratch(*ctx.workspace);
  const Fp8Gradient dy = take_gradient(ctx, model, dy_MN.dim(0), dy_MN.dim(1), segments);
  ops::quantize_rows_columns(ctx, dy_MN, segments, q.precision.activation_pow2, dy.rows, dy.columns,
                             stats);
  fp8_linear_backward(ctx, model, p, dy, x, segments, offsets_E1, dx_MK, grads);
}

// d_score_E of the load-balancing loss for one layer; adds its value to value_1 (FP64).
TensorView balance_gradient(const Context& ctx, const ModelConfig& c, const LayerSaved& s,
                            const BalanceLoss& balance, const TensorView& value_1) {
  const std::int64_t E = c.num_experts, T = s.logits_TE.dim(0), C = c.router.top_k;
  const TensorView d_score_E = ctx.workspace->take(DType::kFp32, {E});
  const TensorView sum_E = ctx.workspace->take(DType::kFp64, {E});
  ops::router_mean_scores(ctx, s.logits_TE, c.router, sum_E);
  ops::balance_gradient(ctx, s.segments.offsets_E1, sum_E,
                        {balance.coefficient, balance.weight, T, C}, d_score_E, value_1);
  return d_score_E;
}

// dx_TD: gradient of the layer's x_out and delta_out (one sum feeds both); on return the gradient
// of its x and delta.
void backward_layer(const Context& ctx, const ModelView& model, int layer,
                    const model::ForwardBatch& batch, const LayerSaved& s, const Segments& dense,
                    const BalanceLoss* balance, const TensorView& balance_value_1,
                    const TensorView& dx_TD, const TensorView& grads,
                    const model::PassCounters& counters) {
  const ModelConfig& c = model.weights->config;
  const model::ParamTable& table = model.weights->table;
  const LayerParams& p = table.layers[layer];
  const std::int64_t T = dx_TD.dim(0), D = c.hidden_size, H = c.num_heads, J = c.num_kv_heads,
                     K = c.head_dim;
  const std::int64_t E = c.num_experts, C = c.router.top_k, M = T * C, F = table.expert_width;
  const TensorView none;
  const auto weight = [&](int i) { return i < 0 ? TensorView{} : model.weights->view(i); };
  const auto grad = [&](int i) {
    return i < 0 ? TensorView{} : model::param_view(table, grads, i);
  };

  ArenaScope scratch(*ctx.workspace);
  const auto bf16 = [&](const Shape& shape) { return ctx.workspace->take(DType::kBf16, shape); };
  const auto fp32 = [&](const Shape& shape) { return ctx.workspace->take(DType::kFp32, shape); };

  // 2. experts
  const TensorView d_down_MD = bf16({M, D}), d_weights_TC = fp32({T, C});
  ops::combine_backward(ctx, dx_TD, s.down_MD, s.weights_TC, s.row_TC, d_down_MD, d_weights_TC);
  const TensorView& offsets = s.segments.offsets_E1;
  const TensorView d_activation_MF = bf16({M, F}), d_routed_MD = bf16({M, D});
  linear_backward(ctx, model, p.down, d_down_MD, {s.activation_MF, s.activation_columns},
                  s.segments, offsets, d_activation_MF, grads,
                  counters.group(model::kExpertActivation));
  const SavedInput routed{s.routed_MD, s.routed_columns};
  if (model.quantized->fp8[p.gate_up]) {
    const Fp8Gradient dy = take_gradient(ctx, model, M, 2 * F, s.segments);
    ops::swiglu_backward_quantize(ctx, s.gate_up_MF, d_activation_MF, s.segments,
                                  model.quantized->precision.activation_pow2, none, dy.rows,
                                  &dy.columns, counters.group(model::kExpertInput));
    fp8_linear_backward(ctx, model, p.gate_up, dy, routed, s.segments, offsets, d_routed_MD, grads);
  } else {
    const TensorView d_gate_up_MF = bf16({M, 2 * F});
    ops::swiglu_backward(ctx, s.gate_up_MF, d_activation_MF, d_gate_up_MF);
    linear_backward(ctx, model, p.gate_up, d_gate_up_MF, routed, s.segments, offsets, d_routed_MD,
                    grads, nullptr);
  }

  const TensorView d_score_E = balance != nullptr && balance->coefficient != 0
                                   ? balance_gradient(ctx, c, s, *balance, balance_value_1)
                                   : none;
  const TensorView d_logits_TE = fp32({T, E}), d_logits_bf16_TE = bf16({T, E}),
                   d_h2_router_TD = bf16({T, D});
  ops::router_backward(ctx, s.logits_TE, s.experts_TC, d_weights_TC, d_score_E, c.router,
                       d_logits_TE);
  ops::cast(ctx, d_logits_TE, d_logits_bf16_TE);
  ops::bf16_gemm(ctx, d_logits_bf16_TE, weight(p.router), ops::BLayout::kKN, none, d_h2_router_TD);
  ops::bf16_weight_gradient(ctx, d_logits_bf16_TE, s.h2_TD, dense.offsets_E1, true, grad(p.router));
  const TensorView d_h2_TD = bf16({T, D});
  ops::permute_backward(ctx, d_routed_MD, s.row_TC, d_h2_router_TD, none, d_h2_TD);
  ops::rms_norm_backward(ctx, d_h2_TD, dx_TD, s.x2_TD, weight(p.post_norm), s.rstd2_T, dx_TD,
                         grad(p.post_norm));

  // 1. attention
  const TensorView d_attention_TN = bf16({T, H * K});
  linear_backward(ctx, model, p.o, dx_TD,
                  {s.attention_THK.reshape({T, H * K}), s.attention_columns}, dense, none,
                  d_attention_TN, grads, counters.group(model::kAttentionOutput));
  const TensorView dq_THK = bf16({T, H, K}), dk_TJK = bf16({T, J, K}), dv_TJK = bf16({T, J, K});
  const double scale = 1.0 / std::sqrt(static_cast<double>(K));
  ops::attention_backward(ctx, s.q_THK, s.k_TJK, s.v_TJK, s.attention_THK, s.lse2_TH,
                          d_attention_TN.reshape({T, H, K}), batch.attention, scale, dq_THK, dk_TJK,
                          dv_TJK);
  const TensorView d_qkv_TN = bf16({T, table.qkv_rows}), d_h1_TD = bf16({T, D});
  tensor::fill_bytes(ctx, d_qkv_TN, 0);  // the padding stays zero
  ops::head_norm_rope_backward(ctx, dq_THK, {s.qkv_TN, table.q_column}, weight(p.q_norm),
                               batch.positions_T, model.cos_PK, model.sin_PK, s.q_rstd_TH,
                               {d_qkv_TN, table.q_column}, grad(p.q_norm));
  ops::head_norm_rope_backward(ctx, dk_TJK, {s.qkv_TN, table.k_column}, weight(p.k_norm),
                               batch.positions_T, model.cos_PK, model.sin_PK, s.k_rstd_TJ,
                               {d_qkv_TN, table.k_column}, grad(p.k_norm));
  ops::head_norm_rope_backward(ctx, dv_TJK, {s.qkv_TN, table.v_column}, none, batch.positions_T,
                               none, none, none, {d_qkv_TN, table.v_column}, none);
  linear_backward(ctx, model, p.qkv, d_qkv_TN, {s.h1_TD, s.h1_columns}, dense, none, d_h1_TD, grads,
                  counters.group(model::kAttentionInput));
  ops::rms_norm_backward(ctx, d_h1_TD, dx_TD, s.x1_TD, weight(p.input_norm), s.rstd1_T, dx_TD,
                         grad(p.input_norm));
}

}  // namespace

void backward(const Context& ctx, const ModelView& model, const model::ForwardBatch& batch,
              const model::ForwardSink& sink, const TensorView& d_hidden_TD, BalanceLoss* balance,
              const TensorView& grads, model::ForwardStats* gradient_stats) {
  const ModelConfig& c = model.weights->config;
  const model::ParamTable& table = model.weights->table;
  ArenaScope scratch(*ctx.workspace);
  const model::PassCounters counters = model::take_counters(ctx, *ctx.workspace, c);
  const TensorView balance_value_1 = ctx.workspace->take(DType::kFp64, {1});
  tensor::fill_bytes(ctx, balance_value_1, 0);
  const TensorView dx_TD = ctx.workspace->take(DType::kBf16, d_hidden_TD.shape);
  ops::rms_norm_backward(ctx, d_hidden_TD, {}, sink.x_final_TD,
                         model.weights->view(table.final_norm), sink.rstd_final_T, dx_TD,
                         model::param_view(table, grads, table.final_norm));
  for (int l = static_cast<int>(c.num_layers) - 1; l >= 0; --l) {
    const LayerSaved* saved = &sink.layers[l];
    LayerSaved again;
    tensor::Arena::Mark mark = sink.arena->mark();
    if (sink.recompute) {
      ArenaScope inner(*ctx.workspace);
      const TensorView x_out = sink.arena->take(DType::kBf16, d_hidden_TD.shape);
      const TensorView delta_out = ctx.workspace->take(DType::kBf16, d_hidden_TD.shape);
      forward_layer(ctx, model, l, batch, nullptr, saved->x_in_TD, saved->delta_in_TD, sink.dense,
                    &again, sink.arena, {}, x_out, delta_out);
      saved = &again;
    }
    backward_layer(ctx, model, l, batch, *saved, sink.dense, balance, balance_value_1, dx_TD, grads,
                   counters);
    sink.arena->release(mark);
  }
  ops::embedding_backward(ctx, batch.tokens_T, dx_TD,
                          model::param_view(table, grads, table.embedding));
  if (balance != nullptr) {
    double value = 0;
    tensor::download(ctx, balance_value_1, &value);
    balance->value += value;
  }
  if (gradient_stats != nullptr) {
    model::ForwardStats stats = model::read_counters(ctx, counters);
    stats.expert_rows.clear();  // the forward's
    gradient_stats->add(stats);
  }
}

}  // namespace lockstep::policy

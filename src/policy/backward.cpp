// Shape letters as in model/forward.cpp. d_x is the gradient of x.
#include "policy/backward.h"

#include "model/operands.h"
#include "model/rope.h"
#include "ops/bias.h"
#include "ops/cast.h"
#include "ops/embedding.h"
#include "ops/gemm.h"
#include "ops/norm.h"
#include "ops/permute.h"
#include "ops/router.h"
#include "ops/swiglu.h"
#include "policy/backward_parts.h"
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

// dx = dy W and dW (+)= dy^T x of one (grouped) linear that runs in FP8.
void fp8_linear_backward(const LayerBackward& l, int p, const Fp8Gradient& dy, const SavedInput& x,
                         const Segments& segments, const TensorView& offsets_E1,
                         const TensorView& dx_MK) {
  ops::fp8_gemm(l.ctx, dy.rows, l.model.quantized->transposed[p], offsets_E1, dx_MK);
  ops::fp8_weight_gradient(l.ctx, dy.columns, x.columns, segments, l.grads.accumulate, l.grad(p));
}

}  // namespace

void linear_backward(const LayerBackward& l, int p, const TensorView& dy_MN, const SavedInput& x,
                     const Segments& segments, const TensorView& offsets_E1,
                     const TensorView& dx_MK, QuantStats* stats) {
  const Context& ctx = l.ctx;
  const model::QuantizedWeights& q = *l.model.quantized;
  if (!q.fp8[p]) {
    ops::bf16_gemm(ctx, dy_MN, l.weight(p), ops::BLayout::kKN, offsets_E1, dx_MK);
    ops::bf16_weight_gradient(ctx, dy_MN, x.x_MK, segments.offsets_E1, l.grads.accumulate,
                              l.grad(p));
    return;
  }
  ArenaScope scratch(*ctx.workspace);
  const Fp8Gradient dy = take_gradient(ctx, l.model, dy_MN.dim(0), dy_MN.dim(1), segments);
  ops::quantize_rows_columns(ctx, dy_MN, segments, q.precision.activation_pow2, dy.rows, dy.columns,
                             stats);
  fp8_linear_backward(l, p, dy, x, segments, offsets_E1, dx_MK);
}

namespace {

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

// From d_down_MD to the gradient of gate|up's input x, over the segments' rows (offsets_E1 empty:
// one expert has all rows).
void mlp_backward(const LayerBackward& l, const model::MlpParams& p, const model::MlpSaved& s,
                  const TensorView& d_down_MD, const SavedInput& x, const Segments& segments,
                  const TensorView& offsets_E1, const TensorView& dx_MD) {
  const Context& ctx = l.ctx;
  const model::QuantizedWeights& q = *l.model.quantized;
  QuantStats* stats = l.counters.group(model::kExpertInput);
  const std::int64_t M = d_down_MD.dim(0), F = p.width;
  const TensorView d_activation_MF = l.bf16({M, F});
  linear_backward(l, p.down, d_down_MD, {s.activation_MF, s.activation_columns}, segments,
                  offsets_E1, d_activation_MF, l.counters.group(model::kExpertActivation));
  if (q.fp8[p.gate_up]) {
    const Fp8Gradient dy = take_gradient(ctx, l.model, M, 2 * F, segments);
    ops::swiglu_backward_quantize(ctx, s.gate_up_MF, d_activation_MF, segments,
                                  q.precision.activation_pow2, {}, dy.rows, &dy.columns, stats);
    fp8_linear_backward(l, p.gate_up, dy, x, segments, offsets_E1, dx_MD);
  } else {
    const TensorView d_gate_up_MF = l.bf16({M, 2 * F});
    ops::swiglu_backward(ctx, s.gate_up_MF, d_activation_MF, d_gate_up_MF);
    linear_backward(l, p.gate_up, d_gate_up_MF, x, segments, offsets_E1, dx_MD, nullptr);
  }
}

// d_h2_TD from the gradient of the layer's output.
void experts_backward(const LayerBackward& l, const BalanceLoss* balance,
                      const TensorView& balance_value_1, const TensorView& dx_TD,
                      const TensorView& d_h2_TD) {
  const auto& [ctx, model, batch, layer, s, dense, grads, counters] = l;
  const ModelConfig& c = l.config();
  const LayerParams& p = l.params();
  const std::int64_t T = dx_TD.dim(0), D = c.hidden_size, E = c.num_experts, C = c.router.top_k,
                     M = T * C;
  const TensorView none;
  const TensorView d_down_MD = l.bf16({M, D}), d_weights_TC = l.fp32({T, C});
  ops::combine_backward(ctx, dx_TD, s.down_MD, s.weights_TC, s.row_TC, d_down_MD, d_weights_TC);
  const TensorView d_routed_MD = l.bf16({M, D});
  mlp_backward(l, p.mlp(), {s.gate_up_MF, s.activation_MF, s.activation_columns}, d_down_MD,
               {s.routed_MD, s.routed_columns}, s.segments, s.segments.offsets_E1, d_routed_MD);
  TensorView d_shared_TD;
  if (p.shared.down >= 0) {
    d_shared_TD = l.bf16({T, D});
    mlp_backward(l, p.shared, s.shared, dx_TD, {s.h2_TD, s.h2_columns}, dense, none, d_shared_TD);
  }

  const TensorView d_score_E = balance != nullptr && balance->coefficient != 0
                                   ? balance_gradient(ctx, c, s, *balance, balance_value_1)
                                   : none;
  const TensorView d_logits_TE = l.fp32({T, E}), d_logits_bf16_TE = l.bf16({T, E}),
                   d_h2_router_TD = l.bf16({T, D});
  ops::router_backward(ctx, s.logits_TE, s.experts_TC, d_weights_TC, d_score_E, c.router,
                       d_logits_TE);
  ops::cast(ctx, d_logits_TE, d_logits_bf16_TE);
  ops::bf16_gemm(ctx, d_logits_bf16_TE, l.weight(p.router), ops::BLayout::kKN, none,
                 d_h2_router_TD);
  ops::bf16_weight_gradient(ctx, d_logits_bf16_TE, s.h2_TD, dense.offsets_E1, grads.accumulate,
                            l.grad(p.router));
  ops::permute_backward(ctx, d_routed_MD, s.row_TC, d_h2_router_TD, d_shared_TD, d_h2_TD);
}

// project_heads of the forward, backward: into `column` of d_qkv_TN.
void project_heads_backward(const LayerBackward& l, const TensorView& d_out_THK,
                            std::int64_t column, int norm, const TensorView& rstd,
                            const TensorView& d_qkv_TN) {
  const auto& [ctx, model, batch, layer, s, dense, grads, counters] = l;
  const ModelConfig& c = l.config();
  if (norm < 0 || !c.qk_norm_whole) {
    ops::head_norm_rope_backward(ctx, d_out_THK, {s.qkv_TN, column}, l.weight(norm),
                                 batch.positions_T, model.cos_PK, model.sin_PK, rstd,
                                 {d_qkv_TN, column}, l.grad(norm));
    return;
  }
  ArenaScope scratch(*ctx.workspace);
  const std::int64_t T = d_out_THK.dim(0), N = d_out_THK.dim(1) * d_out_THK.dim(2);
  const TensorView none, x_TN = l.bf16({T, N}), d_TN = l.bf16({T, N});
  ops::head_norm_rope(ctx, {s.qkv_TN, column}, none, c.rms_eps, batch.positions_T, none, none, none,
                      x_TN.reshape(d_out_THK.shape));
  ops::head_norm_rope_backward(ctx, d_out_THK, {x_TN, 0}, none, batch.positions_T, model.cos_PK,
                               model.sin_PK, none, {d_TN, 0}, none);
  if (c.clip_qkv > 0) {  // what the norm gave, once more
    const TensorView h_TN = l.bf16({T, N}), rstd_T = l.fp32({T});
    ops::rms_norm(ctx, x_TN, none, l.weight(norm), c.rms_eps, x_TN, h_TN, rstd_T);
    ops::clip_backward(ctx, h_TN, model::clip_limit(c), d_TN);
  }
  const TensorView dx_TN = l.bf16({T, N});
  ops::rms_norm_backward(ctx, d_TN, none, x_TN, l.weight(norm), rstd, dx_TN, l.grad(norm));
  ops::head_norm_rope_backward(ctx, dx_TN.reshape(d_out_THK.shape), {s.qkv_TN, column}, none,
                               batch.positions_T, none, none, none, {d_qkv_TN, column}, none);
}

// `bias` -1: the linear has none.
void bias_backward(const LayerBackward& l, int bias, const TensorView& dy_TN) {
  if (bias >= 0) ops::bias_backward(l.ctx, dy_TN, l.grad(bias).reshape({dy_TN.dim(1)}));
}

// From the gradient of what the output projection read to d_qkv_TN.
void grouped_attention_backward(const LayerBackward& l, const TensorView& d_attention_TN,
                                const TensorView& d_qkv_TN) {
  const auto& [ctx, model, batch, layer, s, dense, grads, counters] = l;
  const ModelConfig& c = l.config();
  const model::ParamTable& table = model.weights->table;
  const LayerParams& p = l.params();
  const std::int64_t T = d_attention_TN.dim(0), H = c.num_heads, J = c.num_kv_heads, K = c.head_dim;
  const TensorView none;
  const TensorView dq_THK = l.bf16({T, H, K}), dk_TJK = l.bf16({T, J, K}),
                   dv_TJK = l.bf16({T, J, K});
  const double scale = model::attention_scale(c);
  ops::attention_backward(ctx, s.q_THK, s.k_TJK, s.v_TJK, s.attention_THK, s.lse2_TH,
                          d_attention_TN.reshape({T, H, K}), batch.attention, scale, dq_THK, dk_TJK,
                          dv_TJK);
  project_heads_backward(l, dq_THK, table.q_column, p.q_norm, s.q_rstd_TH, d_qkv_TN);
  project_heads_backward(l, dk_TJK, table.k_column, p.k_norm, s.k_rstd_TJ, d_qkv_TN);
  if (c.clip_qkv > 0) ops::clip_backward(ctx, s.v_TJK, model::clip_limit(c), dv_TJK);
  ops::head_norm_rope_backward(ctx, dv_TJK, {s.qkv_TN, table.v_column}, none, batch.positions_T,
                               none, none, none, {d_qkv_TN, table.v_column}, none);
}

// dx_TD: gradient of the residual stream behind the attention in, of the one before out.
void attention_part_backward(const LayerBackward& l, const TensorView& dx_TD) {
  const auto& [ctx, model, batch, layer, s, dense, grads, counters] = l;
  const ModelConfig& c = l.config();
  const LayerParams& p = l.params();
  const std::int64_t T = dx_TD.dim(0), D = c.hidden_size, o_width = l.weight(p.o).dim(2);
  const TensorView none,
      heads_TN = is_latent(c) ? s.latent.value_TN : s.attention_THK.reshape({T, o_width});
  const TensorView d_heads_TN = l.bf16({T, o_width});
  bias_backward(l, p.o_bias, dx_TD);
  linear_backward(l, p.o, dx_TD, {heads_TN, s.attention_columns}, dense, none, d_heads_TN,
                  counters.group(model::kAttentionOutput));
  const TensorView d_qkv_TN = l.bf16({T, model.weights->table.qkv_rows}), d_h1_TD = l.bf16({T, D});
  tensor::fill_bytes(ctx, d_qkv_TN, 0);  // the padding stays zero
  is_latent(c) ? latent_attention_backward(l, d_heads_TN, d_qkv_TN)
               : grouped_attention_backward(l, d_heads_TN, d_qkv_TN);
  bias_backward(l, p.qkv_bias, d_qkv_TN);
  linear_backward(l, p.qkv, d_qkv_TN, {s.h1_TD, s.h1_columns}, dense, none, d_h1_TD,
                  counters.group(model::kAttentionInput));
  ops::rms_norm_backward(ctx, d_h1_TD, dx_TD, s.x1_TD, l.weight(p.input_norm), s.rstd1_T, dx_TD,
                         l.grad(p.input_norm));
}

// dx_TD: gradient of the layer's x_out and delta_out (one sum feeds both); on return the gradient
// of its x and delta.
void backward_layer(const LayerBackward& l, const BalanceLoss* balance,
                    const TensorView& balance_value_1, const TensorView& dx_TD) {
  ArenaScope scratch(*l.ctx.workspace);
  const LayerSaved& s = l.s;
  const LayerParams& p = l.params();
  const TensorView d_h2_TD = l.bf16(dx_TD.shape);
  if (p.dense())
    mlp_backward(l, p.mlp(), {s.gate_up_MF, s.activation_MF, s.activation_columns}, dx_TD,
                 {s.h2_TD, s.h2_columns}, l.dense, {}, d_h2_TD);
  else
    experts_backward(l, balance, balance_value_1, dx_TD, d_h2_TD);
  ops::rms_norm_backward(l.ctx, d_h2_TD, dx_TD, s.x2_TD, l.weight(p.post_norm), s.rstd2_T, dx_TD,
                         l.grad(p.post_norm));
  attention_part_backward(l, dx_TD);
}

}  // namespace

void backward(const Context& ctx, const ModelView& model, const model::ForwardBatch& batch,
              const model::ForwardSink& sink, const TensorView& d_hidden_TD, BalanceLoss* balance,
              const Gradients& grads, model::ForwardStats* gradient_stats) {
  const ModelConfig& c = model.weights->config;
  const model::ParamTable& table = model.weights->table;
  ArenaScope scratch(*ctx.workspace);
  const model::PassCounters counters = model::take_counters(ctx, *ctx.workspace, c);
  const TensorView balance_value_1 = ctx.workspace->take(DType::kFp64, {1});
  tensor::fill_bytes(ctx, balance_value_1, 0);
  const TensorView dx_TD = ctx.workspace->take(DType::kBf16, d_hidden_TD.shape);
  ops::rms_norm_backward(ctx, d_hidden_TD, {}, sink.x_final_TD,
                         model.weights->view(table.final_norm), sink.rstd_final_T, dx_TD,
                         grads.view(table, table.final_norm));
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
    backward_layer({ctx, model, batch, l, *saved, sink.dense, grads, counters}, balance,
                   balance_value_1, dx_TD);
    sink.arena->release(mark);
  }
  ops::embedding_backward(ctx, batch.tokens_T, dx_TD, grads.view(table, table.embedding));
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

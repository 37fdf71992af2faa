// One layer of the forward pass, and which ops it is made of. Shape letters as in
// model/forward.cpp.
#include "model/forward_parts.h"
#include "model/operands.h"
#include "model/rope.h"
#include "ops/bias.h"
#include "ops/gemm.h"
#include "ops/norm_quantize.h"
#include "ops/permute_quantize.h"
#include "ops/swiglu.h"

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

namespace {

// The same with a bias behind the product, rounded once (`bias` -1: none).
void linear(const Context& ctx, const ModelView& model, int p, int bias, const LinearInput& in,
            const TensorView& offsets_E1, const TensorView& out_MN) {
  if (bias < 0) return linear(ctx, model, p, in, offsets_E1, out_MN);
  ArenaScope scratch(*ctx.workspace);
  const TensorView sums_MN = ctx.workspace->take(DType::kFp32, out_MN.shape);
  linear(ctx, model, p, in, offsets_E1, sums_MN);
  ops::add_bias(ctx, sums_MN, model.weights->view(bias).reshape({out_MN.dim(1)}), out_MN);
}

// The norm of x + delta as what linear `p` reads; x_out and rstd as in rms_norm. h_TD receives the
// norm's BF16 result where the linear runs in BF16.
LinearInput norm_input(const Context& ctx, const ModelView& model, int p, int norm,
                       const TensorView& x_TD, const TensorView& delta_TD,
                       const TensorView& x_out_TD, const TensorView& rstd_T, const Segments& dense,
                       Arena& keep, TensorView& h_TD, Fp8Columns* columns, QuantStats* stats) {
  const QuantizedWeights& q = *model.quantized;
  const std::int64_t T = x_TD.dim(0), D = x_TD.dim(1);
  const float eps = model.weights->config.rms_eps;
  const TensorView w_D = model.weights->view(norm);
  LinearInput in;
  if (!q.fp8[p]) {
    in.x_MK = h_TD = keep.take(DType::kBf16, {T, D});
    ops::rms_norm(ctx, x_TD, delta_TD, w_D, eps, x_out_TD, h_TD, rstd_T);
    return in;
  }
  in.rows = take_rows(*ctx.workspace, T, D, q.precision.scaling());
  if (columns != nullptr) *columns = take_columns(keep, D, T, 1, q.precision.scaling());
  ops::rms_norm_quantize(ctx, x_TD, delta_TD, w_D, eps, x_out_TD, {}, rstd_T, dense,
                         q.precision.activation_pow2, in.rows, columns, stats);
  return in;
}

// SwiGLU of gate|up as what the down projection `p` reads.
LinearInput swiglu_input(const Context& ctx, const ModelView& model, int p,
                         const TensorView& gate_up_MF, const Segments& segments, Arena& keep,
                         TensorView& activation_MF, Fp8Columns* columns, QuantStats* stats) {
  const QuantizedWeights& q = *model.quantized;
  const std::int64_t M = gate_up_MF.dim(0), F = gate_up_MF.dim(1) / 2;
  LinearInput in;
  if (!q.fp8[p]) {
    in.x_MK = activation_MF = keep.take(DType::kBf16, {M, F});
    ops::swiglu(ctx, gate_up_MF, activation_MF);
    return in;
  }
  in.rows = take_rows(*ctx.workspace, M, F, q.precision.scaling());
  if (columns != nullptr)
    *columns = take_columns(keep, F, M, segments.experts(), q.precision.scaling());
  ops::swiglu_quantize(ctx, gate_up_MF, segments, q.precision.activation_pow2, in.rows, columns,
                       stats);
  return in;
}

// Heads of a projection of q|k|v, normalised as the family does (`norm` -1: not), and rotated.
void project_heads(const Context& ctx, const ModelView& model, const ForwardBatch& batch,
                   const TensorView& qkv_TN, std::int64_t column, int norm, const TensorView& rstd,
                   const TensorView& out_THK) {
  const ModelConfig& c = model.weights->config;
  const TensorView w = norm < 0 ? TensorView{} : model.weights->view(norm), none;
  if (norm < 0 || !c.qk_norm_whole) {
    ops::head_norm_rope(ctx, {qkv_TN, column}, w, c.rms_eps, batch.positions_T, model.cos_PK,
                        model.sin_PK, rstd, out_THK);
    return;
  }
  ArenaScope scratch(*ctx.workspace);
  const std::int64_t T = out_THK.dim(0), N = out_THK.dim(1) * out_THK.dim(2);
  const TensorView x_TN = ctx.workspace->take(DType::kBf16, {T, N});
  const TensorView h_TN = ctx.workspace->take(DType::kBf16, {T, N});
  ops::head_norm_rope(ctx, {qkv_TN, column}, none, c.rms_eps, batch.positions_T, none, none, none,
                      x_TN.reshape(out_THK.shape));
  ops::rms_norm(ctx, x_TN, none, w, c.rms_eps, x_TN, h_TN, rstd);
  if (c.clip_qkv > 0) ops::clip(ctx, h_TN, clip_limit(c));
  ops::head_norm_rope(ctx, {h_TN, 0}, none, c.rms_eps, batch.positions_T, model.cos_PK,
                      model.sin_PK, none, out_THK);
}

// From q|k|v: head norm and rotation, cache, softmax(qk)v; what the output projection reads.
TensorView grouped_attention(const LayerPass& l, KvCache* cache) {
  const auto& [ctx, model, batch, layer, dense, saved, s, keep, counters] = l;
  const ModelConfig& c = l.config();
  const ParamTable& table = model.weights->table;
  const LayerParams& p = l.params();
  const std::int64_t T = s.qkv_TN.dim(0), H = c.num_heads, J = c.num_kv_heads, K = c.head_dim;
  const TensorView none;
  s.q_THK = l.bf16({T, H, K}), s.k_TJK = l.bf16({T, J, K}), s.v_TJK = l.bf16({T, J, K});
  if (c.qk_norm) {
    s.q_rstd_TH = l.fp32(c.qk_norm_whole ? Shape{T} : Shape{T, H});
    s.k_rstd_TJ = l.fp32(c.qk_norm_whole ? Shape{T} : Shape{T, J});
  }
  project_heads(ctx, model, batch, s.qkv_TN, table.q_column, p.q_norm, s.q_rstd_TH, s.q_THK);
  project_heads(ctx, model, batch, s.qkv_TN, table.k_column, p.k_norm, s.k_rstd_TJ, s.k_TJK);
  ops::head_norm_rope(ctx, {s.qkv_TN, table.v_column}, none, c.rms_eps, batch.positions_T, none,
                      none, none, s.v_TJK);
  if (c.clip_qkv > 0) ops::clip(ctx, s.v_TJK, clip_limit(c));

  s.attention_THK = l.bf16({T, H, K});
  if (saved) s.lse2_TH = l.fp32({T, H});
  const double scale = attention_scale(c);
  if (cache != nullptr) {
    ops::write_kv(ctx, s.k_TJK, s.v_TJK, batch.slots_T, cache->k[layer], cache->v[layer]);
    ops::attention(ctx, s.q_THK, cache->k[layer], cache->v[layer], batch.attention, scale,
                   s.attention_THK, s.lse2_TH);
  } else {
    ops::attention(ctx, s.q_THK, s.k_TJK, s.v_TJK, batch.attention, scale, s.attention_THK,
                   s.lse2_TH);
  }
  return s.attention_THK.reshape({T, H * K});
}

// Norm, q|k|v, attention, output projection: o_TD.
void attention_part(const LayerPass& l, KvCache* cache, const TensorView& x_TD,
                    const TensorView& delta_TD, const TensorView& o_TD) {
  const auto& [ctx, model, batch, layer, dense, saved, s, keep, counters] = l;
  const ModelConfig& c = l.config();
  const LayerParams& p = l.params();
  const std::int64_t T = x_TD.dim(0), D = c.hidden_size;
  const TensorView none;
  s.x1_TD = l.bf16({T, D}), s.rstd1_T = l.fp32({T});
  const LinearInput h1 =
      norm_input(ctx, model, p.qkv, p.input_norm, x_TD, delta_TD, s.x1_TD, s.rstd1_T, dense, keep,
                 s.h1_TD, l.columns(s.h1_columns), counters.group(kAttentionInput));
  s.qkv_TN = l.bf16({T, model.weights->table.qkv_rows});
  linear(ctx, model, p.qkv, p.qkv_bias, h1, none, s.qkv_TN);
  const TensorView heads_TN =
      is_latent(c) ? latent_attention(l, cache) : grouped_attention(l, cache);
  const LinearInput a =
      linear_input(ctx, model, p.o, heads_TN, dense, &keep, l.columns(s.attention_columns),
                   counters.group(kAttentionOutput));
  linear(ctx, model, p.o, p.o_bias, a, none, o_TD);
}

// Norm, gate|up, SwiGLU, down of a layer without a router.
void dense_part(const LayerPass& l, const TensorView& o_TD, const TensorView& delta_out_TD) {
  const auto& [ctx, model, batch, layer, dense, saved, s, keep, counters] = l;
  const LayerParams& p = l.params();
  const std::int64_t T = o_TD.dim(0);
  const TensorView none;
  const LinearInput h2 =
      norm_input(ctx, model, p.gate_up, p.post_norm, s.x1_TD, o_TD, s.x2_TD, s.rstd2_T, dense, keep,
                 s.h2_TD, l.columns(s.h2_columns), counters.group(kExpertInput));
  s.gate_up_MF = l.bf16({T, 2 * p.width});
  linear(ctx, model, p.gate_up, h2, none, s.gate_up_MF);
  const LinearInput activation =
      swiglu_input(ctx, model, p.down, s.gate_up_MF, dense, keep, s.activation_MF,
                   l.columns(s.activation_columns), counters.group(kExpertActivation));
  linear(ctx, model, p.down, activation, none, delta_out_TD);
}

// The shared experts of h2: gate|up, SwiGLU, down. Empty where the layer has none.
TensorView shared_part(const LayerPass& l) {
  const auto& [ctx, model, batch, layer, dense, saved, s, keep, counters] = l;
  const MlpParams& p = l.params().shared;
  if (p.down < 0) return {};
  const std::int64_t T = s.h2_TD.dim(0);
  const TensorView none, shared_TD = ctx.workspace->take(DType::kBf16, s.h2_TD.shape);
  const LinearInput h2 = linear_input(ctx, model, p.gate_up, s.h2_TD, dense, &keep,
                                      l.columns(s.h2_columns), counters.group(kExpertInput));
  s.shared.gate_up_MF = l.bf16({T, 2 * p.width});
  linear(ctx, model, p.gate_up, h2, none, s.shared.gate_up_MF);
  const LinearInput activation =
      swiglu_input(ctx, model, p.down, s.shared.gate_up_MF, dense, keep, s.shared.activation_MF,
                   l.columns(s.shared.activation_columns), counters.group(kExpertActivation));
  linear(ctx, model, p.down, activation, none, shared_TD);
  return shared_TD;
}

// Norm, router, permute, gate|up, SwiGLU, down, shared experts, combine.
void experts_part(const LayerPass& l, const TensorView& o_TD, const TensorView& delta_out_TD) {
  const auto& [ctx, model, batch, layer, dense, saved, s, keep, counters] = l;
  const ModelConfig& c = l.config();
  const LayerParams& p = l.params();
  const QuantizedWeights& q = *model.quantized;
  const std::int64_t T = o_TD.dim(0), D = c.hidden_size, E = c.num_experts, C = c.router.top_k,
                     M = T * C;
  const TensorView none;
  s.h2_TD = l.bf16({T, D});
  ops::rms_norm(ctx, s.x1_TD, o_TD, model.weights->view(p.post_norm), c.rms_eps, s.x2_TD, s.h2_TD,
                s.rstd2_T);
  s.logits_TE = l.fp32({T, E}), s.weights_TC = l.fp32({T, C}), s.experts_TC = l.int32({T, C});
  ops::bf16_gemm(ctx, s.h2_TD, model.weights->view(p.router), ops::BLayout::kNK, none, s.logits_TE);
  const TensorView bias_E = model.weights->router_bias.view().rows(layer, 1).reshape({E});
  ops::router(ctx, s.logits_TE, bias_E, c.router, s.weights_TC, s.experts_TC);
  s.segments = {
      counters.offsets_LE ? counters.offsets_LE.rows(layer, 1).reshape({E + 1}) : l.int32({E + 1}),
      l.int32({E + 1})};
  s.row_TC = l.int32({T, C}), s.token_M = l.int32({M});
  ops::plan_permutation(ctx, s.experts_TC, s.segments, s.row_TC, s.token_M);
  const TensorView& offsets = s.segments.offsets_E1;

  LinearInput routed;
  if (q.fp8[p.gate_up]) {
    routed.rows = take_rows(*ctx.workspace, M, D, q.precision.scaling());
    if (saved) s.routed_columns = take_columns(keep, D, M, E, q.precision.scaling());
    ops::permute_quantize(ctx, s.h2_TD, s.token_M, s.segments, q.precision.activation_pow2,
                          routed.rows, l.columns(s.routed_columns), counters.group(kExpertInput));
  } else {
    routed.x_MK = s.routed_MD = l.bf16({M, D});
    ops::permute(ctx, s.h2_TD, s.token_M, s.routed_MD);
  }
  s.gate_up_MF = l.bf16({M, 2 * p.width});
  linear(ctx, model, p.gate_up, routed, offsets, s.gate_up_MF);
  const LinearInput activation =
      swiglu_input(ctx, model, p.down, s.gate_up_MF, s.segments, keep, s.activation_MF,
                   l.columns(s.activation_columns), counters.group(kExpertActivation));
  s.down_MD = l.bf16({M, D});
  linear(ctx, model, p.down, activation, offsets, s.down_MD);
  ops::combine(ctx, s.down_MD, s.weights_TC, s.row_TC, shared_part(l), delta_out_TD);
}

}  // namespace

void forward_layer(const Context& ctx, const ModelView& model, int layer, const ForwardBatch& batch,
                   KvCache* cache, const TensorView& x_TD, const TensorView& delta_TD,
                   const Segments& dense, LayerSaved* saved, Arena* keep_arena,
                   const PassCounters& counters, const TensorView& x_out_TD,
                   const TensorView& delta_out_TD) {
  ArenaScope scratch(*ctx.workspace);
  LayerSaved local;
  LayerSaved& s = saved != nullptr ? *saved : local;
  const LayerPass l{ctx,     model,
                    batch,   layer,
                    dense,   saved != nullptr,
                    s,       saved != nullptr ? *keep_arena : *ctx.workspace,
                    counters};
  const TensorView o_TD = ctx.workspace->take(DType::kBf16, x_TD.shape);
  attention_part(l, cache, x_TD, delta_TD, o_TD);
  s.x2_TD = x_out_TD, s.rstd2_T = l.fp32({x_TD.dim(0)});
  if (l.params().dense())
    dense_part(l, o_TD, delta_out_TD);
  else
    experts_part(l, o_TD, delta_out_TD);
}

}  // namespace lockstep::model

// Shape letters as in model/forward_latent.cpp. d_x is the gradient of x.
#include "model/forward_parts.h"
#include "model/rope.h"
#include "ops/columns.h"
#include "ops/head_gemm.h"
#include "policy/backward_parts.h"

namespace lockstep::policy {

using model::LatentSaved;
using model::LayerParams;
using model::ModelConfig;
using ops::BLayout;
using ops::Columns;
using ops::HeadRows;
using tensor::TensorView;

void latent_attention_backward(const LayerBackward& l, const TensorView& d_value_TN,
                               const TensorView& d_qkv_TN) {
  const auto& [ctx, model, batch, layer, s, dense, grads, counters] = l;
  const ModelConfig& c = l.config();
  const LayerParams& p = l.params();
  const LatentSaved& saved = s.latent;
  const auto [L, q_rank, nope, value, interleaved] = c.latent;
  const std::int64_t T = d_value_TN.dim(0), H = c.num_heads, K = L + c.head_dim,
                     width = nope + c.head_dim, q_column = model.weights->table.q_column,
                     kv_column = model.weights->table.k_column;
  const auto pairs = interleaved ? ops::RopePairs::kInterleaved : ops::RopePairs::kHalves;
  const TensorView w_HNL = model::head_matrices(c, l.weight(p.kv_b)),
                   dw_HNL = model::head_matrices(c, l.grad(p.kv_b)), none;
  const HeadRows w_k{w_HNL, 0, nope}, w_v{w_HNL, nope, value}, dw_k{dw_HNL, 0, nope},
      dw_v{dw_HNL, nope, value};

  const TensorView d_out_THL = l.bf16({T, H, L});
  const Columns d_value{d_value_TN, 0, value}, d_out{d_out_THL.reshape({T, H * L}), 0, L};
  ops::head_gemm(ctx, d_value, w_v, BLayout::kKN, d_out);
  ops::head_weight_gradient(ctx, d_value, {s.attention_THK.reshape({T, H * L}), 0, L},
                            grads.accumulate, dw_v);

  const TensorView dq_THK = l.bf16({T, H, K}), dk_TJK = l.bf16({T, 1, K});
  ops::attention_backward(ctx, s.q_THK, s.k_TJK, none, s.attention_THK, s.lse2_TH, d_out_THL,
                          batch.attention, model::attention_scale(c), dq_THK, dk_TJK, none);

  const Columns dk{dk_TJK.reshape({T, K})};
  ops::rms_norm_columns_backward(ctx, dk, {s.qkv_TN, kv_column}, l.weight(p.k_norm),
                                 saved.kv_rstd_T, {d_qkv_TN, kv_column}, l.grad(p.k_norm));
  ops::rope_columns_backward(ctx, {dk.slab_TN, L}, 1, pairs, batch.positions_T, model.cos_PK,
                             model.sin_PK, {d_qkv_TN, kv_column + L});

  const TensorView dq_TN = dq_THK.reshape({T, H * K});
  const bool by_latent = p.q_b >= 0;
  const Columns q = by_latent ? Columns{saved.q_TN, 0, width} : Columns{s.qkv_TN, q_column, width};
  const Columns d_q =
      by_latent ? Columns{l.bf16({T, H * width}), 0, width} : Columns{d_qkv_TN, q_column, width};
  ops::head_gemm(ctx, {dq_TN, 0, K}, w_k, BLayout::kNK, d_q);
  ops::head_weight_gradient(ctx, q, {dq_TN, 0, K}, grads.accumulate, dw_k);
  ops::rope_columns_backward(ctx, {dq_TN, L, K}, H, pairs, batch.positions_T, model.cos_PK,
                             model.sin_PK, {d_q.slab_TN, d_q.column + nope, width});
  if (!by_latent) return;
  const TensorView d_latent_TQ = l.bf16({T, q_rank});
  linear_backward(l, p.q_b, d_q.slab_TN, {saved.q_latent_TQ, saved.q_latent_columns}, dense, {},
                  d_latent_TQ, counters.group(model::kAttentionInput));
  ops::rms_norm_columns_backward(ctx, {d_latent_TQ}, {s.qkv_TN, q_column}, l.weight(p.q_norm),
                                 saved.q_rstd_T, {d_qkv_TN, q_column}, l.grad(p.q_norm));
}

}  // namespace lockstep::policy

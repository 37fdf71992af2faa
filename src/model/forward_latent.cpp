// Multi-head latent attention in its absorbed form (ADR 0008): queries are taken into the space of
// the latent vectors, so that all heads attend to one row a token, and what they gather is taken to
// each head's values behind the attention. L latent width, R rotated width, N rows of the fused
// slab, H heads; a row of the cache is latent|rotated key, K = L + R.
#include "model/forward_parts.h"
#include "model/rope.h"
#include "ops/columns.h"
#include "ops/head_gemm.h"

namespace lockstep::model {

using ops::BLayout;
using ops::Columns;
using tensor::Arena;
using tensor::DType;
using tensor::TensorView;

TensorView head_matrices(const ModelConfig& c, const TensorView& kv_b) {
  return kv_b.reshape({c.num_heads, c.latent.nope + c.latent.value, c.latent.kv_rank});
}

namespace {

// The queries as the projections leave them, head h at column + h * stride: in the slab, or by way
// of their own latent vector.
Columns project_queries(const LayerPass& l) {
  const auto& [ctx, model, batch, layer, dense, saved, s, keep, counters] = l;
  const ModelConfig& c = l.config();
  const LayerParams& p = l.params();
  const std::int64_t T = s.qkv_TN.dim(0), width = c.latent.nope + c.head_dim,
                     q_column = model.weights->table.q_column;
  if (p.q_b < 0) return {s.qkv_TN, q_column, width};
  LatentSaved& a = s.latent;
  // A weight gradient in FP8 reads column codes alone.
  Arena& keep_input = model.quantized->fp8[p.q_b] ? *ctx.workspace : keep;
  const TensorView q_latent_TQ = keep_input.take(DType::kBf16, {T, c.latent.q_rank});
  a.q_rstd_T = l.fp32({T});
  ops::rms_norm_columns(ctx, {s.qkv_TN, q_column}, model.weights->view(p.q_norm), kLatentEps,
                        {q_latent_TQ}, a.q_rstd_T);
  a.q_latent_TQ = q_latent_TQ;
  const LinearInput in =
      linear_input(ctx, model, p.q_b, q_latent_TQ, dense, &keep, l.columns(a.q_latent_columns),
                   counters.group(kAttentionInput));
  a.q_TN = l.bf16({T, c.num_heads * width});
  linear(ctx, model, p.q_b, in, {}, a.q_TN);
  return {a.q_TN, 0, width};
}

}  // namespace

TensorView latent_attention(const LayerPass& l, KvCache* cache) {
  const auto& [ctx, model, batch, layer, dense, saved, s, keep, counters] = l;
  const ModelConfig& c = l.config();
  const LayerParams& p = l.params();
  const auto [L, q_rank, nope, value, interleaved] = c.latent;
  const std::int64_t T = s.qkv_TN.dim(0), H = c.num_heads, K = L + c.head_dim,
                     kv_column = model.weights->table.k_column;
  const auto pairs = interleaved ? ops::RopePairs::kInterleaved : ops::RopePairs::kHalves;
  const TensorView w_HNL = head_matrices(c, model.weights->view(p.kv_b)), none;
  const Columns q = project_queries(l);

  const TensorView kv_TK = l.bf16({T, K});
  s.latent.kv_rstd_T = l.fp32({T});
  ops::rms_norm_columns(ctx, {s.qkv_TN, kv_column}, model.weights->view(p.k_norm), kLatentEps,
                        {kv_TK}, s.latent.kv_rstd_T);
  ops::rope_columns(ctx, {s.qkv_TN, kv_column + L}, 1, pairs, batch.positions_T, model.cos_PK,
                    model.sin_PK, {kv_TK, L});
  const TensorView q_TN = l.bf16({T, H * K});
  ops::head_gemm(ctx, q, {w_HNL, 0, nope}, BLayout::kKN, {q_TN, 0, K});
  ops::rope_columns(ctx, {q.slab_TN, q.column + nope, q.stride}, H, pairs, batch.positions_T,
                    model.cos_PK, model.sin_PK, {q_TN, L, K});

  s.q_THK = q_TN.reshape({T, H, K}), s.k_TJK = kv_TK.reshape({T, 1, K});
  s.attention_THK = l.bf16({T, H, L});
  if (saved) s.lse2_TH = l.fp32({T, H});
  if (cache != nullptr) ops::write_kv(ctx, s.k_TJK, none, batch.slots_T, cache->k[layer], none);
  ops::attention(ctx, s.q_THK, cache != nullptr ? cache->k[layer].view() : s.k_TJK, none,
                 batch.attention, attention_scale(c), s.attention_THK, s.lse2_TH);
  Arena& keep_input = model.quantized->fp8[p.o] ? *ctx.workspace : keep;
  s.latent.value_TN = keep_input.take(DType::kBf16, {T, H * value});
  ops::head_gemm(ctx, {s.attention_THK.reshape({T, H * L}), 0, L}, {w_HNL, nope, value},
                 BLayout::kNK, {s.latent.value_TN, 0, value});
  return s.latent.value_TN;
}

}  // namespace lockstep::model

// The one forward pass. The rollout calls it with KV pages and no sink; the policy calls it with a
// sink that keeps what the backward needs. There is no other forward.
#pragma once

#include <vector>

#include "model/weights.h"
#include "ops/attention.h"

namespace lockstep::model {

// Weights seen under one precision.
struct ModelView {
  const Weights* weights = nullptr;
  const QuantizedWeights* quantized = nullptr;
  tensor::TensorView cos_PK, sin_PK;  // rotary tables, [max_positions, K/2]
};

// Owns the rotary tables that ModelViews of one model share.
struct RopeTables {
  tensor::Tensor cos_PK, sin_PK;
};
RopeTables make_rope_tables(const tensor::Context& ctx, const ModelConfig& config);

// T tokens of S sequences. Without a cache the keys are the batch's own.
struct ForwardBatch {
  tensor::TensorView tokens_T;     // int32
  tensor::TensorView positions_T;  // int32
  ops::AttentionBatch attention;
  tensor::TensorView
      slots_T;  // int32, rows of the cache that the new keys go to; empty without a cache
};

// Keys and values of all layers: [rows, J, K] each. Latent attention: k holds [rows, 1, L + R], the
// normalised latent vector beside the rotated key, and v nothing.
struct KvCache {
  std::vector<tensor::Tensor> k, v;
  std::size_t bytes() const;
};
// What one token takes in all layers, in bytes.
std::int64_t kv_row_bytes(const ModelConfig& config);
// Not initialised.
KvCache make_kv_cache(const tensor::Context& ctx, const ModelConfig& config, std::int64_t rows);
// Whether the cache is one of this model with so many rows.
bool cache_fits(const KvCache& cache, const ModelConfig& config, std::int64_t rows);

// What latent attention leaves for its backward besides q (taken to the latent space), k and the
// attention's result (both in it).
struct LatentSaved {
  tensor::TensorView q_rstd_T, kv_rstd_T;
  tensor::TensorView q_latent_TQ, q_TN;  // empty without a latent of the queries
  ops::Fp8Columns q_latent_columns;
  tensor::TensorView value_TN;  // the output projection's input
};

struct MlpSaved {
  tensor::TensorView gate_up_MF, activation_MF;
  ops::Fp8Columns activation_columns;
};

// What one layer leaves for its backward. Linears that run in FP8 leave column codes, others their
// BF16 input.
struct LayerSaved {
  tensor::TensorView x_in_TD, delta_in_TD;  // recompute: the layer's input
  tensor::TensorView x1_TD, rstd1_T, h1_TD;
  ops::Fp8Columns h1_columns;
  tensor::TensorView qkv_TN, q_THK, k_TJK, v_TJK;
  tensor::TensorView q_rstd_TH, k_rstd_TJ;  // of one norm over all heads [T]
  tensor::TensorView attention_THK, lse2_TH;
  ops::Fp8Columns attention_columns;
  LatentSaved latent;
  tensor::TensorView x2_TD, rstd2_T, h2_TD;
  // Of dense layers and shared experts; the rest down to token_M and down_MD: of experts.
  ops::Fp8Columns h2_columns;
  MlpSaved shared;
  tensor::TensorView logits_TE, weights_TC, experts_TC, row_TC, token_M;
  ops::Segments segments;  // routed rows by expert
  tensor::TensorView routed_MD;
  ops::Fp8Columns routed_columns;
  tensor::TensorView gate_up_MF, activation_MF;
  ops::Fp8Columns activation_columns;
  tensor::TensorView down_MD;
};

// Counters of FP8 health by tensor group, and how many rows each expert had.
struct ForwardStats {
  ops::QuantStats attention_input, attention_output, expert_input, expert_activation;
  std::vector<std::int64_t> expert_rows;  // [layer * E + expert], rows routed there
  void add(const ForwardStats& other);
};

// The same counters while a pass runs: on the device, where the ops add to them.
enum StatGroup { kAttentionInput, kAttentionOutput, kExpertInput, kExpertActivation, kStatGroups };
struct PassCounters {
  ops::QuantStats* stats = nullptr;  // by StatGroup
  tensor::TensorView offsets_LE;  // int32 [layers, E + 1], the routed rows' offsets of each layer

  ops::QuantStats* group(StatGroup g) const { return stats == nullptr ? nullptr : stats + g; }
};
PassCounters take_counters(const tensor::Context& ctx, tensor::Arena& arena, const ModelConfig& c);
// Waits for the device.
ForwardStats read_counters(const tensor::Context& ctx, const PassCounters& counters);

struct ForwardSink {
  tensor::Arena* arena = nullptr;  // of the context's device
  bool recompute = false;          // keep only the layers' inputs
  std::vector<LayerSaved> layers;
  tensor::TensorView x_final_TD, rstd_final_T, hidden_TD;
  ops::Segments dense;  // one segment of all T rows
  PassCounters counters;
};

// hidden_TD (BF16 [T, D]): the final norm's output, the input of the head.
void forward(const tensor::Context& ctx, const ModelView& model, const ForwardBatch& batch,
             KvCache* cache, ForwardSink* sink, const tensor::TensorView& hidden_TD);

// One layer, for the recomputing backward: x_TD and delta_TD in, x_out_TD and delta_out_TD out,
// which may be the same memory.
void forward_layer(const tensor::Context& ctx, const ModelView& model, int layer,
                   const ForwardBatch& batch, KvCache* cache, const tensor::TensorView& x_TD,
                   const tensor::TensorView& delta_TD, const ops::Segments& dense,
                   LayerSaved* saved, tensor::Arena* keep, const PassCounters& counters,
                   const tensor::TensorView& x_out_TD, const tensor::TensorView& delta_out_TD);

// logits_RV FP32 of rows of hidden.
void head_logits(const tensor::Context& ctx, const ModelView& model,
                 const tensor::TensorView& hidden_RD, const tensor::TensorView& logits_RV);

// One segment of `rows` rows, and where it lies padded: for the column codes of plain linears.
ops::Segments dense_segments(const tensor::Context& ctx, tensor::Arena& arena, std::int64_t rows);

}  // namespace lockstep::model

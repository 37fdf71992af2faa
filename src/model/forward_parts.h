// What the parts of one layer's forward share: forward_layer.cpp and the families' own attention.
#pragma once

#include "model/forward.h"

namespace lockstep::model {

// What a linear reads: row codes where it runs in FP8, else the BF16 rows.
struct LinearInput {
  tensor::TensorView x_MK;
  ops::Fp8Rows rows;
};

// `columns` (may be null) receives the column codes for the weight gradient.
LinearInput linear_input(const tensor::Context& ctx, const ModelView& model, int p,
                         const tensor::TensorView& x_MK, const ops::Segments& segments,
                         tensor::Arena* keep, ops::Fp8Columns* columns, ops::QuantStats* stats);

void linear(const tensor::Context& ctx, const ModelView& model, int p, const LinearInput& in,
            const tensor::TensorView& offsets_E1, const tensor::TensorView& out_MN);

struct LayerPass {
  const tensor::Context& ctx;
  const ModelView& model;
  const ForwardBatch& batch;
  int layer;
  const ops::Segments& dense;  // empty without a backward
  bool saved;                  // for a backward
  LayerSaved& s;
  tensor::Arena& keep;
  const PassCounters& counters;

  const ModelConfig& config() const { return model.weights->config; }
  const LayerParams& params() const { return model.weights->table.layers[layer]; }
  ops::Fp8Columns* columns(ops::Fp8Columns& of) const { return saved ? &of : nullptr; }
  tensor::TensorView bf16(const tensor::Shape& shape) const {
    return keep.take(tensor::DType::kBf16, shape);
  }
  tensor::TensorView fp32(const tensor::Shape& shape) const {
    return keep.take(tensor::DType::kFp32, shape);
  }
  tensor::TensorView int32(const tensor::Shape& shape) const {
    return keep.take(tensor::DType::kInt32, shape);
  }
};

// Latent attention (ADR 0008) from s.qkv_TN, the slab q_a|kv_a or q|kv_a: what the output
// projection reads, [T, heads * value width].
tensor::TensorView latent_attention(const LayerPass& l, KvCache* cache);

// kv_b as [H, nope + value, L]: of each head the rows of W_uk, then those of W_uv.
tensor::TensorView head_matrices(const ModelConfig& config, const tensor::TensorView& kv_b);

}  // namespace lockstep::model

// What the parts of one layer's backward share: backward.cpp and the families' own attention.
#pragma once

#include "model/forward.h"
#include "policy/gradients.h"

namespace lockstep::policy {

// What the forward kept of a linear's input: column codes or BF16 rows.
struct SavedInput {
  tensor::TensorView x_MK;
  ops::Fp8Columns columns;
};

struct LayerBackward {
  const tensor::Context& ctx;
  const model::ModelView& model;
  const model::ForwardBatch& batch;
  int layer;
  const model::LayerSaved& s;
  const ops::Segments& dense;
  const Gradients& grads;
  const model::PassCounters& counters;

  const model::ModelConfig& config() const { return model.weights->config; }
  const model::LayerParams& params() const { return model.weights->table.layers[layer]; }
  tensor::TensorView weight(int p) const {
    return p < 0 ? tensor::TensorView{} : model.weights->view(p);
  }
  tensor::TensorView grad(int p) const {
    return p < 0 ? tensor::TensorView{} : grads.view(model.weights->table, p);
  }
  tensor::TensorView bf16(const tensor::Shape& shape) const {
    return ctx.workspace->take(tensor::DType::kBf16, shape);
  }
  tensor::TensorView fp32(const tensor::Shape& shape) const {
    return ctx.workspace->take(tensor::DType::kFp32, shape);
  }
};

// dx = dy W and dW (+)= dy^T x of one (grouped) linear of either precision, from a BF16 gradient.
void linear_backward(const LayerBackward& l, int p, const tensor::TensorView& dy_MN,
                     const SavedInput& x, const ops::Segments& segments,
                     const tensor::TensorView& offsets_E1, const tensor::TensorView& dx_MK,
                     ops::QuantStats* stats);

// latent_attention of model/forward_parts.h, backward: from d_value_TN, the gradient of what the
// output projection read, to d_qkv_TN, whose padding is left alone.
void latent_attention_backward(const LayerBackward& l, const tensor::TensorView& d_value_TN,
                               const tensor::TensorView& d_qkv_TN);

}  // namespace lockstep::policy

// The model once more, in double precision on plain arrays, written from the maths alone: the
// oracle of the golden tests and of the engine's error bounds. Slow on purpose; shares no
// arithmetic with ops/ but for the oracles in ops/reference/. Pre-norm decoder, grouped-query
// attention with or without QK-norm and with rotary embedding (half rotation) or latent attention,
// router with top-k weights, SwiGLU experts with or without shared ones, or one dense MLP.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "model/weights.h"

namespace lockstep::model {

// A matrix [rows, columns]; vectors have one row.
struct ReferenceMatrix {
  std::int64_t rows = 0, columns = 0;
  std::vector<double> values;
  ReferenceMatrix() = default;
  ReferenceMatrix(std::int64_t r, std::int64_t c)
      : rows(r), columns(c), values(static_cast<std::size_t>(r * c)) {}
  double* row(std::int64_t r) { return values.data() + r * columns; }
  const double* row(std::int64_t r) const { return values.data() + r * columns; }
};

// By checkpoint name.
using ReferenceParams = std::map<std::string, ReferenceMatrix>;

struct ReferenceModel {
  ModelConfig config;
  ReferenceParams params;
  // theta^(-2i/K) for the pair (i, i + K/2). Data, because a PyTorch model that was converted to
  // BF16 and back computes with frequencies rounded to BF16, as the golden files did.
  std::vector<double> inverse_frequencies;
  double rope_factor = 1;                             // of cos and sin
  std::vector<std::vector<double>> router_bias = {};  // by layer; empty: none
};
ReferenceModel reference_model(const Weights& weights);

// The weights without padding; `slab` is laid out by weights.table (FP32 or BF16), so the same
// function reads gradients and masters. An empty view reads weights.slab.
ReferenceParams reference_params(const Weights& weights, const tensor::TensorView& slab = {});

// Which experts each token takes: [token * top_k + slot], by layer; of a dense layer nothing.
using ReferenceRouting = std::vector<std::vector<int>>;

// What one layer leaves for its backward.
struct ReferenceLayer {
  ReferenceMatrix x1, h1, q_raw, k_raw, q, k, v, probabilities, attention, x2, h2, scores;
  ReferenceMatrix q_latent, kv_latent;  // of latent attention, normalised
  ReferenceMatrix router_logits;
  std::vector<int> experts;
  std::vector<double> weights;                      // of the chosen experts
  std::vector<std::vector<double>> gate, up, down;  // by (token, slot); dense, shared: by token
  std::vector<std::vector<double>> shared_gate, shared_up;
};

struct ReferencePass {
  std::vector<std::int32_t> tokens;
  std::vector<ReferenceLayer> layers;
  ReferenceMatrix x_final, hidden, logits;  // logits [T, V]
};

// One sequence. With `routing` the experts are those, whatever the scores say; `first_token` is the
// sequence's first row in it.
ReferencePass reference_forward(const ReferenceModel& model,
                                const std::vector<std::int32_t>& tokens,
                                const ReferenceRouting* routing = nullptr,
                                std::int64_t first_token = 0);

// Adds to `gradients` (made when empty) what d_logits [T, V] give.
void reference_backward(const ReferenceModel& model, const ReferencePass& pass,
                        const ReferenceMatrix& d_logits, ReferenceParams& gradients);

// Mean cross-entropy of each token given those before it, over all sequences together (the loss of
// transformers with labels = input_ids). gradients may be null.
double reference_loss(const ReferenceModel& model,
                      const std::vector<std::vector<std::int32_t>>& sequences,
                      ReferenceParams* gradients, const ReferenceRouting* routing = nullptr);

struct ReferenceAdamw {
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
  std::int64_t step = 0;
  ReferenceParams m, v;
};
// One step; decay is decoupled and on all parameters.
void reference_adamw(ReferenceAdamw& state, const ReferenceParams& gradients,
                     ReferenceParams& params);

// `tokens` continued greedily by `count` tokens (ties to the lower index). gaps, if not null, gets
// for each new token the distance between the two largest logits.
std::vector<std::int32_t> reference_greedy(const ReferenceModel& model,
                                           std::vector<std::int32_t> tokens, int count,
                                           std::vector<double>* gaps = nullptr);

}  // namespace lockstep::model

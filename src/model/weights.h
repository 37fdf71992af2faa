// A model's weights in memory: one BF16 slab, and for each precision in use one set of FP8 codes
// with their transposes. Policy and rollout read the same memory; the optimizer writes it in place,
// so a refit in one process copies nothing.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "model/parameters.h"

namespace lockstep::model {

// FP8 codes of all parameters that run in FP8 under one precision; entries of other parameters are
// empty.
struct QuantizedWeights {
  Precision precision;
  std::vector<bool> fp8;  // by parameter
  std::vector<ops::Fp8Weight> forward;
  std::vector<ops::Fp8Weight> transposed;
  std::vector<tensor::Tensor> memory;
  ops::QuantStats stats;  // of the last quantization
  // By parameter, in host memory: codes that the file has of weights that run in BF16 in every
  // precision (ParamKind::kHeads), so that saving gives them back. Forgotten with the first change
  // of the weights.
  std::vector<ops::Fp8Weight> stored;
  std::vector<tensor::Tensor> stored_memory;
};

struct Weights {
  ModelConfig config;
  ParamTable table;
  tensor::Tensor slab;  // BF16 [table.count]
  // FP32 [layers, E] (one column without experts), added to the scores for the selection only;
  // starts at zero.
  tensor::Tensor router_bias;
  bool router_bias_bf16 = false;  // in the file; it is saved so while its values allow it
  std::vector<std::shared_ptr<QuantizedWeights>> quantized;
  std::uint64_t version = 0;

  tensor::TensorView view(int p) const { return param_view(table, slab, p); }
};

// Zero weights of this shape.
Weights make_weights(const ModelConfig& config);

// The same weights with all their tensors in host memory, for saving; shared with `weights` where
// they are there already. FP8 codes are left out.
Weights on_host(const Weights& weights);

// Moves the slab and the selection bias to the context's device. Before quantized_for. InputError
// for a model whose widths the device does not take (model/device_limits.h), here and in
// quantized_for.
void move_to(const tensor::Context& ctx, Weights& weights);

// Random weights: normal(0, initializer_range) for matrices, 1 for norms, from Philox(seed) by
// element, so independent of order. The padding stays zero. In host memory.
void initialize(Weights& weights, std::uint64_t seed);

// The quantized set for a precision, made and filled if it is not there yet (a BF16 precision gives
// a set without codes).
std::shared_ptr<QuantizedWeights> quantized_for(const tensor::Context& ctx, Weights& weights,
                                                const Precision& precision);

// Fills every quantized set from the BF16 slab again, in place; `except` (may be null) is left as
// it is, because its codes were written with the weights. All forget their stored codes.
void requantize(const tensor::Context& ctx, Weights& weights,
                const QuantizedWeights* except = nullptr);

// For whoever writes a set's codes: zeroed counters on the context's device, from its workspace,
// and at the end their way to q.stats.
ops::QuantStats* begin_stats(const tensor::Context& ctx);
void end_stats(const tensor::Context& ctx, const ops::QuantStats* stats, QuantizedWeights& q);

}  // namespace lockstep::model

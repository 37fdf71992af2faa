#include "policy/policy.h"

#include <algorithm>
#include <cmath>

#include "ops/adamw_quantize.h"
#include "ops/cast.h"
#include "policy/backward.h"
#include "policy/head.h"
#include "policy/packing.h"
#include "tensor/device.h"

namespace lockstep::policy {

using data::TrainSequence;
using tensor::ArenaScope;
using tensor::DType;
using tensor::Tensor;
using tensor::TensorView;

model::ModelView Policy::view() const {
  return {weights.get(), quantized.get(), rope.cos_PK, rope.sin_PK};
}

Policy make_policy(const tensor::Context& ctx, std::shared_ptr<model::Weights> weights,
                   const PolicyOptions& options) {
  Policy p;
  p.options = options;
  p.ctx = ctx;
  p.weights = std::move(weights);
  p.quantized = model::quantized_for(ctx, *p.weights, options.precision);
  p.rope = model::make_rope_tables(ctx, p.weights->config);
  p.saved = tensor::Arena(ctx.device);
  const std::int64_t n = p.weights->table.count;
  const DType moments = options.bf16_moments ? DType::kBf16 : DType::kFp32;
  p.master = Tensor(ctx.device, DType::kFp32, {n});
  p.m = Tensor(ctx.device, moments, {n});
  p.v = Tensor(ctx.device, moments, {n});
  p.grads = Tensor(ctx.device, DType::kFp32, {n});
  ops::cast(ctx, p.weights->slab, p.master);
  return p;
}

namespace {

Logprobs shaped_like(std::span<const TrainSequence> sequences) {
  Logprobs out;
  for (const TrainSequence& s : sequences) out.emplace_back(s.tokens.size(), 0.0f);
  return out;
}

void add_stats(std::map<std::string, double>& metrics, const std::string& prefix,
               const ops::QuantStats& s) {
  const double values = static_cast<double>(std::max<std::int64_t>(1, s.values));
  metrics[prefix + "saturated"] = static_cast<double>(s.saturated) / values;
  metrics[prefix + "flushed_to_zero"] = static_cast<double>(s.flushed_to_zero) / values;
  metrics[prefix + "nonfinite_blocks"] = static_cast<double>(s.nonfinite_blocks);
  metrics[prefix + "amax_min"] = s.amax_min;
  metrics[prefix + "amax_max"] = s.amax_max;
}

void fp8_metrics(const Policy& p, std::map<std::string, double>& metrics) {
  if (!p.options.precision.fp8) return;
  const auto group = [&](const std::string& side, const model::ForwardStats& s) {
    add_stats(metrics, "fp8/" + side + "/attention_input/", s.attention_input);
    add_stats(metrics, "fp8/" + side + "/attention_output/", s.attention_output);
    add_stats(metrics, "fp8/" + side + "/expert_input/", s.expert_input);
    add_stats(metrics, "fp8/" + side + "/expert_activation/", s.expert_activation);
  };
  group("forward", p.forward_stats);
  group("gradient", p.gradient_stats);
  add_stats(metrics, "fp8/weights/", p.quantized->stats);
}

void moe_metrics(const Policy& p, std::map<std::string, double>& metrics) {
  const std::vector<std::int64_t>& rows = p.forward_stats.expert_rows;
  const auto E = static_cast<std::size_t>(p.weights->config.num_experts);
  double worst = 0, imbalance = 0, dead = 0, layers = 0;
  for (std::size_t l = 0; l < p.weights->table.layers.size(); ++l) {
    if (rows.empty() || p.weights->table.layers[l].dense()) continue;
    ++layers;
    const std::int64_t* rows_E = rows.data() + l * E;
    double sum = 0, square = 0, top = 0;
    for (std::size_t e = 0; e < E; ++e) {
      const auto load = static_cast<double>(rows_E[e]);
      sum += load, square += load * load, top = std::max(top, load);
      dead += load == 0;
    }
    if (sum == 0) continue;
    const double mean = sum / static_cast<double>(E);
    worst = std::max(worst, top / mean);
    imbalance += std::sqrt(std::max(0.0, square / static_cast<double>(E) - mean * mean)) / mean;
  }
  metrics["moe/max_load_over_mean"] = worst;
  metrics["moe/load_cv"] = layers == 0 ? 0 : imbalance / layers;
  metrics["moe/idle_experts"] = dead;
  metrics["moe/aux_loss"] = p.aux_loss;
}

void update_router_bias(Policy& p) {
  if (p.options.bias_update_rate == 0) return;
  const auto E = static_cast<std::size_t>(p.weights->config.num_experts);
  const std::vector<std::int64_t>& rows = p.forward_stats.expert_rows;
  const Tensor host = tensor::to_host(p.weights->router_bias);
  float* bias = host.as<float>();
  for (std::size_t l = 0; l < p.weights->table.layers.size(); ++l) {
    if (rows.empty() || p.weights->table.layers[l].dense()) continue;
    std::int64_t sum = 0;
    for (std::size_t e = 0; e < E; ++e) sum += rows[l * E + e];
    for (std::size_t e = 0; e < E; ++e) {
      const std::int64_t gap = sum - rows[l * E + e] * static_cast<std::int64_t>(E);
      const double sign = gap > 0 ? 1 : gap < 0 ? -1 : 0;
      bias[l * E + e] += static_cast<float>(p.options.bias_update_rate * sign);
    }
  }
  tensor::copy(p.ctx, host, p.weights->router_bias);
}

// AdamW over the slab. Weights that the policy runs in FP8 blockwise get their codes in the same
// pass; what lies between them is stepped in one piece. The other sets are quantized afterwards,
// and with BF16 moments all of them: there the two passes are faster (bench/gpu/adamw_bench.cpp).
void update_weights(Policy& p, const ops::AdamwOptions& options) {
  const model::Weights& weights = *p.weights;
  model::QuantizedWeights& own = *p.quantized;
  const bool fused = own.precision.fp8 && own.precision.scaling() == ops::Scaling::kBlock &&
                     !p.options.bf16_moments;
  const ArenaScope scratch(*p.ctx.workspace);
  ops::QuantStats* stats = fused ? model::begin_stats(p.ctx) : nullptr;
  std::int64_t done = 0;
  const auto step_until = [&](std::int64_t end) {
    const auto part = [&](const TensorView& slab) { return slab.rows(done, end - done); };
    if (done < end)
      ops::adamw(p.ctx, part(p.grads), options, part(p.master), part(p.m), part(p.v),
                 part(weights.slab));
    done = end;
  };
  for (std::size_t i = 0; fused && i < own.fp8.size(); ++i) {
    if (!own.fp8[i]) continue;
    const auto part = [&](const TensorView& slab) {
      return model::param_view(weights.table, slab, static_cast<int>(i));
    };
    const model::Param& param = weights.table.params[i];
    step_until(param.offset);
    ops::adamw_quantize(p.ctx, part(p.grads), options, part(p.master), part(p.m), part(p.v),
                        part(weights.slab), own.precision.weight_pow2, own.forward[i],
                        own.transposed[i], stats);
    done = param.offset + param.shape.count();
  }
  step_until(weights.table.count);
  if (fused) model::end_stats(p.ctx, stats, own);
  model::requantize(p.ctx, *p.weights, fused ? &own : nullptr);
}

void reset_step(Policy& p) {
  p.accumulated = false;
  p.loss = p.aux_loss = 0;
  p.tokens = 0;
  p.forward_stats = p.gradient_stats = {};
}

}  // namespace

Logprobs score(const tensor::Context& ctx, const model::ModelView& model,
               std::span<const TrainSequence> sequences, const ops::RowSampling& sampling,
               Logprobs* entropies) {
  const model::ModelConfig& c = model.weights->config;
  ArenaScope scratch(*ctx.workspace);
  const Packed packed = pack(ctx, *ctx.workspace, sequences, c.max_positions);
  const TensorView hidden_TD = ctx.workspace->take(DType::kBf16, {packed.tokens, c.hidden_size});
  model::forward(ctx, model, packed.batch, nullptr, nullptr, hidden_TD);
  const HeadRows rows =
      make_head_rows(ctx, *ctx.workspace, packed.row_R, packed.target_R, sampling);
  const auto stats = head_forward(ctx, model, hidden_TD, rows);
  Logprobs out = shaped_like(sequences);
  if (entropies != nullptr) *entropies = out;
  for (std::size_t r = 0; r < stats.size(); ++r) {
    out[packed.sequence_R[r]][packed.position_R[r]] = stats[r].logprob;
    if (entropies != nullptr)
      (*entropies)[packed.sequence_R[r]][packed.position_R[r]] = stats[r].entropy;
  }
  return out;
}

void begin_step(Policy& p) { reset_step(p); }

Logprobs accumulate(Policy& p, std::span<const TrainSequence> sequences, double share,
                    const ops::RowSampling& sampling, const LossFunction& loss) {
  const model::ModelConfig& c = p.weights->config;
  ArenaScope scratch(*p.ctx.workspace);
  p.saved.reset();
  const Packed packed = pack(p.ctx, *p.ctx.workspace, sequences, c.max_positions);
  p.tokens += packed.tokens;
  model::ForwardSink sink;
  sink.arena = &p.saved;
  sink.recompute = p.options.activation_checkpointing;
  const TensorView hidden_TD = p.saved.take(DType::kBf16, {packed.tokens, c.hidden_size});
  const TensorView d_hidden_TD = p.saved.take(DType::kBf16, {packed.tokens, c.hidden_size});
  model::forward(p.ctx, p.view(), packed.batch, nullptr, &sink, hidden_TD);
  const HeadRows rows =
      make_head_rows(p.ctx, *p.ctx.workspace, packed.row_R, packed.target_R, sampling);
  const auto stats = head_forward(p.ctx, p.view(), hidden_TD, rows);
  p.forward_stats.add(model::read_counters(p.ctx, sink.counters));

  Logprobs logprobs = shaped_like(sequences), d_logprobs = shaped_like(sequences);
  for (std::size_t r = 0; r < stats.size(); ++r)
    logprobs[packed.sequence_R[r]][packed.position_R[r]] = stats[r].logprob;
  p.loss += loss(logprobs, d_logprobs);
  std::vector<float> g_R(stats.size());
  for (std::size_t r = 0; r < stats.size(); ++r)
    g_R[r] = d_logprobs[packed.sequence_R[r]][packed.position_R[r]];

  const Gradients grads{p.grads, p.accumulated};
  if (!p.accumulated) zero_sums(p.ctx, p.weights->table, p.grads);
  head_backward(p.ctx, p.view(), hidden_TD, rows, g_R, d_hidden_TD, grads);
  BalanceLoss balance{p.options.aux_loss_coeff, share, 0};
  backward(p.ctx, p.view(), packed.batch, sink, d_hidden_TD, &balance, grads, &p.gradient_stats);
  p.accumulated = true;
  p.aux_loss += balance.value;
  return logprobs;
}

StepResult finish_step(Policy& p, double learning_rate) {
  StepResult result;
  result.loss = p.loss;
  result.aux_loss = p.aux_loss;
  result.lr = learning_rate;
  if (!p.accumulated) tensor::fill_bytes(p.ctx, p.grads, 0);  // a step without micro-batches
  std::vector<TensorView> grads;
  for (std::size_t i = 0; i < p.weights->table.params.size(); ++i)
    grads.push_back(model::param_view(p.weights->table, p.grads, static_cast<int>(i)));
  result.grad_norm = ops::global_norm(p.ctx, grads);
  moe_metrics(p, result.metrics);

  if (!std::isfinite(result.loss))
    result.skip_reason = fmt::format("the loss is {}", result.loss);
  else if (!std::isfinite(result.grad_norm))
    result.skip_reason = fmt::format("the gradient norm is {}", result.grad_norm);
  if (!result.skip_reason.empty()) {
    result.skipped = true;
    ++p.skipped_consecutive, ++p.skipped_total;
    const Guard& guard = p.options.guard;
    if (guard.abort || p.skipped_consecutive > guard.max_consecutive ||
        p.skipped_total > guard.max_total)
      base::fail<base::SystemError>(
          "training stopped: {} ({} steps skipped in a row, {} in all; policy.guard allows {} and "
          "{}). The weights are those of "
          "the last good step; lower policy.optimizer.lr or resume from an earlier checkpoint",
          result.skip_reason, p.skipped_consecutive, p.skipped_total,
          guard.abort ? 0 : guard.max_consecutive, guard.abort ? 0 : guard.max_total);
  } else {
    p.skipped_consecutive = 0;
    ops::AdamwOptions adamw = p.options.adamw;
    adamw.lr = learning_rate;
    adamw.step = ++p.optimizer_step;
    adamw.clip = ops::clip_factor(result.grad_norm, p.options.max_grad_norm);
    update_weights(p, adamw);
    update_router_bias(p);
    ++p.weights->version;
  }
  fp8_metrics(p, result.metrics);
  return result;
}

void publish(Policy& p) {
  ops::cast(p.ctx, p.master, p.weights->slab);
  model::requantize(p.ctx, *p.weights);
}

}  // namespace lockstep::policy

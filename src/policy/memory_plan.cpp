#include "policy/memory_plan.h"

namespace lockstep::policy {

using data::TrainSequence;

MemoryPlan plan_memory(Policy& p, std::int64_t sequences, std::int64_t length,
                       std::int64_t scored) {
  MemoryPlan plan;
  const auto add = [](std::size_t& to, const tensor::TensorView& t) { to += t.bytes(); };
  add(plan.weights, p.weights->slab);
  for (const auto& q : p.weights->quantized)
    for (const tensor::Tensor& t : q->memory) add(plan.weights, t);
  for (const tensor::Tensor* t : {&p.master, &p.m, &p.v, &p.grads}) add(plan.optimizer, *t);
  if (p.ctx.device == tensor::Device::kCpu) return plan;

  TrainSequence sequence;
  const std::int64_t vocab = p.weights->config.vocab_size;
  for (std::int64_t t = 0; t < length; ++t)  // varied, so that all experts get some
    sequence.tokens.push_back(static_cast<std::int32_t>(t * 7919 % vocab));
  sequence.loss_mask.assign(sequence.tokens.size(), 1.0f);
  sequence.loss_mask[0] = 0;
  const auto batch = [&](std::int64_t n) {
    return std::vector<TrainSequence>(static_cast<std::size_t>(n), sequence);
  };
  begin_step(p);
  accumulate(p, batch(sequences), 1.0, {}, [](const Logprobs&, Logprobs&) { return 0.0; });
  begin_step(p);
  if (scored > 0) score(p.ctx, p.view(), batch(scored), {});
  p.saved.reset();
  plan.activations = p.saved.consolidate();
  plan.workspace = p.ctx.workspace->consolidate();
  return plan;
}

}  // namespace lockstep::policy

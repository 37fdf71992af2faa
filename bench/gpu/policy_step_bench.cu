// Gradients of a step of the policy at real width: four layers of Qwen3-30B-A3B's sizes, FP8
// blockwise, micro-batches of 32 sequences of 850 tokens of which 512 are trained. Once with a
// first micro-batch that writes the gradients of matrices, once with one that adds to zeros.
//   gpu_policy_step_bench
#include <chrono>

#include "gpu_bench.h"
#include "policy/policy.h"
#include "random_fill.cuh"
#include "tensor/device.h"

namespace lockstep::bench {
namespace {

using policy::Policy;

model::ModelConfig config() {
  model::ModelConfig c;
  c.vocab_size = 151936, c.hidden_size = 2048, c.num_layers = 4;
  c.num_heads = 32, c.num_kv_heads = 4, c.head_dim = 128;
  c.max_positions = 4096;
  c.qk_norm = true;
  c.num_experts = 128, c.moe_intermediate_size = 768;
  c.router.top_k = 8;
  return c;
}

std::vector<data::TrainSequence> micro_batch() {
  std::vector<data::TrainSequence> out(32);
  std::uint32_t state = 1;
  for (data::TrainSequence& s : out)
    for (int t = 0; t < 850; ++t) {
      state = state * 1664525 + 1013904223;
      s.tokens.push_back(static_cast<std::int32_t>((state >> 8) % 151936));
      s.loss_mask.push_back(t < 850 - 512 ? 0.0f : 1.0f);
    }
  return out;
}

// Seconds of begin_step and `micro_batches` micro-batches.
double time_step(Policy& p, const std::vector<data::TrainSequence>& batch, int micro_batches,
                 bool writes) {
  tensor::synchronize(p.ctx);
  const auto begin = std::chrono::steady_clock::now();
  begin_step(p);
  if (!writes) {
    tensor::fill_bytes(p.ctx, p.grads, 0);
    p.accumulated = true;
  }
  for (int i = 0; i < micro_batches; ++i)
    accumulate(p, batch, 1.0, {}, [](const policy::Logprobs&, policy::Logprobs& d) {
      for (auto& sequence : d) std::fill(sequence.begin() + 850 - 512, sequence.end(), -1e-5f);
      return 0.0;
    });
  tensor::synchronize(p.ctx);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

void run() {
  tensor::Arena arena(tensor::Device::kCuda);
  const tensor::Context ctx = tensor::cuda_context(arena);
  std::printf("%s\n", tensor::device_text(ctx).c_str());
  auto weights = std::make_shared<model::Weights>(model::make_weights(config()));
  model::move_to(ctx, *weights);
  fill_normal(ctx, weights->slab.as<numerics::Bf16>(), weights->table.count, 1, 0.02f);
  policy::PolicyOptions options;
  options.precision.fp8 = true;
  Policy p = make_policy(ctx, weights, options);
  const auto batch = micro_batch();
  time_step(p, batch, 1, true);  // memory
  for (const int micro_batches : {1, 2, 4}) {
    std::vector<double> seconds[2];
    for (int i = 0; i < 5; ++i)
      for (const bool writes : {false, true})
        seconds[writes].push_back(time_step(p, batch, micro_batches, writes));
    for (auto& s : seconds) std::sort(s.begin(), s.end());
    std::printf(
        "%d micro-batches: adding to zeros %.1f ms (%.1f to %.1f), writing %.1f ms "
        "(%.1f to %.1f)\n",
        micro_batches, seconds[0][2] * 1e3, seconds[0][0] * 1e3, seconds[0][4] * 1e3,
        seconds[1][2] * 1e3, seconds[1][0] * 1e3, seconds[1][4] * 1e3);
  }
}

}  // namespace
}  // namespace lockstep::bench

int main() {
  try {
    lockstep::bench::run();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}

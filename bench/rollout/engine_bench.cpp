// Host cost of the scheduler alone, and tokens a second of the engine on a tiny model: 1,024
// requests in groups of 16, prompts of 20 tokens, 20 new ones.
#include <benchmark/benchmark.h>

#include <deque>

#include "rollout/engine.h"

namespace lockstep::rollout {
namespace {

constexpr int kRequests = 1024, kGroup = 16, kPrompt = 20, kNew = 20;

std::vector<std::int32_t> prompt(int i) {
  std::vector<std::int32_t> tokens;
  for (int t = 0; t < kPrompt; ++t) tokens.push_back((i / kGroup * 7 + t * 3) % 64);
  return tokens;
}

void scheduler_alone(benchmark::State& state) {
  std::int64_t tokens = 0;
  for (auto _ : state) {
    Options o;
    o.block_size = 16;
    o.num_blocks = 1024;
    Scheduler scheduler(o);
    std::deque<Sequence> sequences(kRequests);
    for (int i = 0; i < kRequests; ++i) {
      Sequence& s = sequences[i];
      s.id = i;
      s.request.prompt = s.tokens = prompt(i);
      s.prompt_length = kPrompt;
      s.max_length = kPrompt + kNew;
      scheduler.add(s);
    }
    StepPlan plan;
    while (scheduler.unfinished() > 0) {
      scheduler.schedule(plan);
      scheduler.commit(plan);
      for (const Draw& draw : plan.draws) {
        draw.sequence->tokens.push_back(1);
        ++tokens;
        if (draw.sequence->length() == draw.sequence->max_length) scheduler.finish(*draw.sequence);
      }
    }
  }
  state.SetItemsProcessed(tokens);
}
BENCHMARK(scheduler_alone)->Unit(benchmark::kMillisecond);

void engine(benchmark::State& state) {
  model::ModelConfig c;
  c.vocab_size = 64;
  c.hidden_size = 128;
  c.num_layers = 2;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.head_dim = 32;
  c.max_positions = 64;
  c.qk_norm = true;
  c.num_experts = 8;
  c.moe_intermediate_size = 128;
  c.router.top_k = 2;
  model::Weights weights = model::make_weights(c);
  model::initialize(weights, 1);
  tensor::Arena arena;
  const tensor::Context ctx = tensor::cpu_context(arena, static_cast<int>(state.range(1)));
  model::Precision precision;
  precision.fp8 = true;
  const auto quantized = model::quantized_for(ctx, weights, precision);
  const model::RopeTables rope = model::make_rope_tables(ctx, c);
  Options o;
  o.max_num_seqs = static_cast<int>(state.range(0));
  Engine engine(ctx, o, [](const std::vector<std::int32_t>&) { return std::string(); });
  engine.set_model({&weights, quantized.get(), rope.cos_PK, rope.sin_PK}, 1);
  std::int64_t tokens = 0;
  for (auto _ : state) {
    std::vector<Request> requests(kRequests);
    for (int i = 0; i < kRequests; ++i) {
      requests[i].stream = static_cast<std::uint64_t>(i);
      requests[i].prompt = prompt(i);
      requests[i].sampling.max_new_tokens = kNew;
    }
    for (const auto& t : engine.generate(std::move(requests)))
      tokens += static_cast<std::int64_t>(t.response.size());
  }
  state.SetItemsProcessed(tokens);
}
BENCHMARK(engine)
    ->ArgNames({"seqs", "threads"})
    ->Args({32, 1})
    ->Args({256, 1})
    ->Args({256, 2})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace lockstep::rollout

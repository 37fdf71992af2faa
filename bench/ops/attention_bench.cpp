// Attention on one thread: short sequences as the demo packs them, a longer prefill, decode over
// pages. FLOP are those of visible keys only: 2 K + 2 Kv a query and key forward, 2.5 times that
// backward.
#include <benchmark/benchmark.h>

#include "ops/attention_case.h"

namespace lockstep::ops::test {
namespace {

// Arguments: sequences, length, H, J, width.
AttentionCase bench_case(const benchmark::State& state) {
  Rng rng(1);
  const AttentionSizes n{state.range(2), state.range(3), state.range(4), state.range(4), 0.125};
  return attention_case(
      rng, n, std::vector<std::int64_t>(static_cast<std::size_t>(state.range(0)), state.range(1)));
}

double visible_flop(const AttentionCase& x, bool last_only) {
  double keys = 0;
  for (const std::int64_t L : x.lengths)
    keys += static_cast<double>(last_only ? L : L * (L + 1) / 2);
  return keys * static_cast<double>(x.sizes.H * 2 * (x.sizes.K + x.sizes.Kv));
}

void report(benchmark::State& state, double flop) {
  state.counters["GFLOP/s"] =
      benchmark::Counter(flop * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

void attention_forward(benchmark::State& state) {
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const AttentionCase x = bench_case(state);
  AttentionResult r(x);
  attention(ctx, x.q_THK, x.k_TJK, x.v_TJK, x.batch(), x.sizes.scale, r.out_THK,
            r.lse2_TH);  // warms the arena
  for (auto _ : state)
    attention(ctx, x.q_THK, x.k_TJK, x.v_TJK, x.batch(), x.sizes.scale, r.out_THK, r.lse2_TH);
  report(state, visible_flop(x, false));
}

void attention_gradient(benchmark::State& state) {
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const AttentionCase x = bench_case(state);
  AttentionResult r(x);
  attention(ctx, x.q_THK, x.k_TJK, x.v_TJK, x.batch(), x.sizes.scale, r.out_THK, r.lse2_TH);
  Poisoned d_q(DType::kBf16, x.q_THK.view().shape), d_k(DType::kBf16, x.k_TJK.view().shape),
      d_v(DType::kBf16, x.v_TJK.view().shape);
  for (auto _ : state)
    attention_backward(ctx, x.q_THK, x.k_TJK, x.v_TJK, r.out_THK, r.lse2_TH, r.out_THK, x.batch(),
                       x.sizes.scale, d_q, d_k, d_v);
  report(state, 2.5 * visible_flop(x, false));
}

// The last position of each sequence over pages of 16.
void attention_decode(benchmark::State& state) {
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const AttentionCase x = bench_case(state);
  const std::int64_t S = state.range(0), length = state.range(1), pages = length / 16;
  std::vector<std::int32_t> offsets, table;
  for (std::int64_t s = 0; s <= S; ++s) offsets.push_back(static_cast<std::int32_t>(s));
  for (std::int64_t p = 0; p < S * pages; ++p)
    table.push_back(static_cast<std::int32_t>(S * pages - 1 - p));
  const Tensor offsets_S1 = int32_tensor(offsets), flat = int32_tensor(table);
  const AttentionBatch batch{offsets_S1, x.lengths_S, flat.view().reshape({S, pages}), 16};
  const TensorView q_THK = x.q_THK.view().rows(0, S);
  Poisoned out(DType::kBf16, {S, x.sizes.H, x.sizes.Kv});
  attention(ctx, q_THK, x.k_TJK, x.v_TJK, batch, x.sizes.scale, out, {});
  for (auto _ : state) attention(ctx, q_THK, x.k_TJK, x.v_TJK, batch, x.sizes.scale, out, {});
  report(state, visible_flop(x, true));
}

#define SHORT Args({64, 16, 4, 2, 32})->Args({64, 48, 4, 2, 32})->Args({64, 48, 8, 2, 64})
BENCHMARK(attention_forward)->SHORT->Args({1, 1024, 8, 2, 64})->Unit(benchmark::kMicrosecond);
BENCHMARK(attention_gradient)->SHORT->Args({1, 1024, 8, 2, 64})->Unit(benchmark::kMicrosecond);
BENCHMARK(attention_decode)
    ->SHORT->Args({8, 1024, 8, 2, 64})
    ->Args({8, 1024, 32, 4, 128})
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace lockstep::ops::test

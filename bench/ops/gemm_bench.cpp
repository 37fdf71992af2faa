// Speed of the GEMMs, in 2*M*N*K flops a second of wall time. Every case first compares a sample of
// its results with the scalar tensor-core model and refuses to report when one differs.
//   gemm_bench --benchmark_filter=Fp8Gemm/512/512/512
// Arguments: M, N, K, experts (rows shared evenly), threads.
#include <benchmark/benchmark.h>

#include "ops/gemm_model.h"

namespace lockstep::ops::test {
namespace {

struct Sizes {
  std::int64_t M, N, K, E;
  int threads;
  explicit Sizes(const benchmark::State& state)
      : M(state.range(0)),
        N(state.range(1)),
        K(state.range(2)),
        E(state.range(3)),
        threads(static_cast<int>(state.range(4))) {}
};

Tensor even_offsets(const Sizes& s, std::int64_t multiple) {
  std::vector<std::int32_t> offsets;
  for (std::int64_t e = 0; e <= s.E; ++e)
    offsets.push_back(static_cast<std::int32_t>(
        multiple == 1 ? s.M * e / s.E : e * ((s.M / s.E + multiple) / multiple * multiple)));
  return int32_tensor(offsets);
}

Tensor random_scales(Rng& rng, const Shape& shape) {
  Tensor out = empty(DType::kFp32, shape);
  for (std::int64_t i = 0; i < shape.count(); ++i)
    out.as<float>()[i] = static_cast<float>(uniform(rng, 0.5, 1.5));
  return out;
}

// Compares `rows` rows spread over the output with the model's whole result for those rows.
bool sample_equals(const TensorView& d,
                   const std::function<float(std::int64_t, std::int64_t)>& model) {
  const std::int64_t M = d.dim(0), N = d.dim(1);
  for (std::int64_t i = 0; i < 2000; ++i) {
    const std::int64_t m = i * 7919 % M, n = i * 104729 % N;
    const float expected = model(m, n), found = d.as<float>()[m * N + n];
    if (std::memcmp(&expected, &found, sizeof(float)) != 0) return false;
  }
  return true;
}

void count(benchmark::State& state, const Sizes& s) {
  state.counters["flops"] = benchmark::Counter(2.0 * static_cast<double>(s.M * s.N * s.K),
                                               benchmark::Counter::kIsIterationInvariantRate);
}

void Fp8Gemm(benchmark::State& state) {
  const Sizes s(state);
  Rng rng(1);
  const std::int64_t G = (s.K + 127) / 128;
  const Tensor a = random_normal(rng, DType::kE4m3, {s.M, s.K}, 60.0);
  const Tensor b = random_normal(rng, DType::kE4m3, {s.E, s.N, s.K}, 60.0);
  const Tensor sa = random_scales(rng, {G, s.M});
  const Tensor sb = random_scales(rng, {s.E, (s.N + 127) / 128, G});
  const Tensor offsets = even_offsets(s, 1), d = empty(DType::kFp32, {s.M, s.N});
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, s.threads);
  const auto run = [&] { fp8_gemm(ctx, {a, sa}, {b, sb}, offsets, d); };
  run();
  const bool equal = sample_equals(d.view(), [&](std::int64_t m, std::int64_t n) {
    std::int64_t e = 0;
    while (offsets.as<std::int32_t>()[e + 1] <= m) ++e;
    return model_fp8(
        DType::kE4m3, a.view().fp8() + m * s.K, DType::kE4m3, b.view().fp8() + (e * s.N + n) * s.K,
        s.K, Scaling::kBlock, [&](std::int64_t g) { return sa.as<float>()[g * s.M + m]; },
        [&](std::int64_t g) {
          return sb.as<float>()[(e * ((s.N + 127) / 128) + n / 128) * G + g];
        });
  });
  if (!equal) return state.SkipWithError("result differs from the scalar model");
  for (auto _ : state) run();
  count(state, s);
}

void Fp8WeightGradient(benchmark::State& state) {  // contraction M, output [E, N, K]
  const Sizes s(state);
  Rng rng(2);
  const Tensor offsets = even_offsets(s, 1), padded = even_offsets(s, 128);
  const std::int64_t R = padded.as<std::int32_t>()[s.E];
  const Tensor dy = random_normal(rng, DType::kE4m3, {s.N, R}, 60.0);
  const Tensor x = random_normal(rng, DType::kE4m3, {s.K, R}, 60.0);
  const Tensor sdy = random_scales(rng, {R / 128, s.N}), sx = random_scales(rng, {R / 128, s.K});
  const Tensor d = empty(DType::kFp32, {s.E, s.N, s.K});
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, s.threads);
  const auto run = [&] {
    fp8_weight_gradient(ctx, {dy, sdy}, {x, sx}, {offsets, padded}, false, d);
  };
  run();
  const bool equal = sample_equals(d.view().reshape({s.E * s.N, s.K}), [&](std::int64_t row,
                                                                           std::int64_t k) {
    const std::int64_t e = row / s.N, n = row % s.N;
    const std::int64_t first = padded.as<std::int32_t>()[e];
    return model_fp8(
        DType::kE4m3, dy.view().fp8() + n * R + first, DType::kE4m3, x.view().fp8() + k * R + first,
        offsets.as<std::int32_t>()[e + 1] - offsets.as<std::int32_t>()[e], Scaling::kBlock,
        [&](std::int64_t g) { return sdy.as<float>()[(first / 128 + g) * s.N + n]; },
        [&](std::int64_t g) { return sx.as<float>()[(first / 128 + g) * s.K + k]; });
  });
  if (!equal) return state.SkipWithError("result differs from the scalar model");
  for (auto _ : state) run();
  count(state, s);
}

void bf16_case(benchmark::State& state, BLayout layout) {
  const Sizes s(state);
  Rng rng(3);
  const bool nk = layout == BLayout::kNK;
  const Tensor a = random_normal(rng, DType::kBf16, {s.M, s.K});
  const Tensor b =
      random_normal(rng, DType::kBf16, nk ? Shape{s.E, s.N, s.K} : Shape{s.E, s.K, s.N});
  const Tensor offsets = even_offsets(s, 1), d = empty(DType::kFp32, {s.M, s.N});
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, s.threads);
  const auto run = [&] { bf16_gemm(ctx, a, b, layout, offsets, d); };
  run();
  const bool equal = sample_equals(d.view(), [&](std::int64_t m, std::int64_t n) {
    std::int64_t e = 0;
    while (offsets.as<std::int32_t>()[e + 1] <= m) ++e;
    return model_chain(
        numerics::kBf16Step,
        [&](std::int64_t k) { return numerics::bf16_term(a.as<numerics::Bf16>()[m * s.K + k]); },
        [&](std::int64_t k) {
          return numerics::bf16_term(
              b.as<numerics::Bf16>()[nk ? (e * s.N + n) * s.K + k : (e * s.K + k) * s.N + n]);
        },
        0, s.K, 0.0f);
  });
  if (!equal) return state.SkipWithError("result differs from the scalar model");
  for (auto _ : state) run();
  count(state, s);
}
void Bf16Gemm(benchmark::State& state) { bf16_case(state, BLayout::kNK); }
void Bf16GemmKn(benchmark::State& state) { bf16_case(state, BLayout::kKN); }

void Bf16WeightGradient(benchmark::State& state) {
  const Sizes s(state);
  Rng rng(4);
  const Tensor dy = random_normal(rng, DType::kBf16, {s.M, s.N});
  const Tensor x = random_normal(rng, DType::kBf16, {s.M, s.K});
  const Tensor offsets = even_offsets(s, 1), d = empty(DType::kFp32, {s.E, s.N, s.K});
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, s.threads);
  const auto run = [&] { bf16_weight_gradient(ctx, dy, x, offsets, false, d); };
  run();
  const bool equal = sample_equals(d.view().reshape({s.E * s.N, s.K}), [&](std::int64_t row,
                                                                           std::int64_t k) {
    const std::int64_t e = row / s.N, n = row % s.N;
    return model_chain(
        numerics::kBf16Step,
        [&](std::int64_t m) { return numerics::bf16_term(dy.as<numerics::Bf16>()[m * s.N + n]); },
        [&](std::int64_t m) { return numerics::bf16_term(x.as<numerics::Bf16>()[m * s.K + k]); },
        offsets.as<std::int32_t>()[e], offsets.as<std::int32_t>()[e + 1], 0.0f);
  });
  if (!equal) return state.SkipWithError("result differs from the scalar model");
  for (auto _ : state) run();
  count(state, s);
}

void shapes(benchmark::internal::Benchmark* b) {
  b->UseRealTime()->Unit(benchmark::kMicrosecond);
  b->Args({512, 512, 512, 1, 1})->Args({512, 512, 512, 1, 2});
  for (const std::int64_t threads : {1, 2})
    for (const std::int64_t M : {1, 8, 32, 128, 512}) b->Args({M, 256, 256, 1, threads});
  b->Args({512, 256, 256, 8, 2})->Args({32, 256, 256, 8, 2});
}
BENCHMARK(Fp8Gemm)->Apply(shapes);
BENCHMARK(Fp8WeightGradient)->Apply(shapes);
BENCHMARK(Bf16Gemm)->Apply(shapes);
BENCHMARK(Bf16GemmKn)->Apply(shapes);
BENCHMARK(Bf16WeightGradient)->Apply(shapes);

}  // namespace
}  // namespace lockstep::ops::test

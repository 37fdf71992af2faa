// Token embedding and its gradient: the GPU's bytes against the CPU's.
#include "ops/embedding.h"

#include "gpu/gpu_test.h"

namespace lockstep::ops::test {
namespace {

using EmbeddingGpu = GpuTest;

struct EmbeddingCase {
  std::int64_t T, V, D;
  int kind;  // 0: even, 1: few ids, 2: one id, 3: one id a third of the time
};

Tensor make_tokens(Rng& rng, const EmbeddingCase& c) {
  Tensor tokens = empty(DType::kInt32, {c.T});
  for (std::int64_t t = 0; t < c.T; ++t) {
    std::int64_t v = uniform_int(rng, 0, c.V - 1);
    if (c.kind == 1) v = v % 3 * (c.V / 3);
    if (c.kind == 2 || (c.kind == 3 && rng() % 3 == 0)) v = c.V - 1;
    tokens.as<std::int32_t>()[t] = static_cast<std::int32_t>(v);
  }
  return tokens;
}

TEST_F(EmbeddingGpu, BothWays) {
  Rng rng(1);
  std::vector<EmbeddingCase> cases = {
      {65536, 151936, 16, 3}, {9001, 129280, 16, 0}, {4096, 151936, 16, 1}, {20011, 700, 40, 2}};
  for (const std::int64_t V : {1, 5, 512, 513, 1000})
    for (const std::int64_t T : {0, 1, 31, 32, 33, 127, 1009})
      cases.push_back({T, V, 48, T % 4 == 1});
  for (const std::int64_t D : {1, 7, 16, 48, 128, 768, 2048, 7168})
    for (const int kind : {0, 1, 2, 3}) cases.push_back({257, 97, D, kind});
  for (const EmbeddingCase& c : cases) {
    if (left_out(5)) continue;
    const std::string what = fmt::format("T {} V {} D {} kind {}", c.T, c.V, c.D, c.kind);
    const Tensor tokens = make_tokens(rng, c), w = random_normal(rng, DType::kBf16, {c.V, c.D}),
                 dx = random_normal(rng, DType::kBf16, {c.T, c.D}),
                 dw = random_normal(rng, DType::kFp32, {c.V, c.D});
    const TensorView gtokens = on_gpu(tokens), gdw = on_gpu(dw);
    const Tensor x = cpu_output(DType::kBf16, {c.T, c.D});
    const TensorView gx = gpu_output(DType::kBf16, {c.T, c.D});
    embedding(cpu, tokens, w, x);
    embedding(gpu, gtokens, on_gpu(w), gx);
    expect_same(x, gx, what);
    embedding_backward(cpu, tokens, dx, dw);
    embedding_backward(gpu, gtokens, on_gpu(dx), gdw);
    expect_same(dw, gdw, what + " dw");
  }
}

TEST_F(EmbeddingGpu, TokensOutsideTheVocabularyAreClamped) {
  Rng rng(2);
  const Tensor w = random_normal(rng, DType::kBf16, {9, 16}),
               dx = random_normal(rng, DType::kBf16, {3, 16}),
               dw = random_normal(rng, DType::kFp32, {9, 16});
  const Tensor tame = int32_tensor({0, 8, 8}), wild = int32_tensor({-7, 9, 1 << 30});
  const TensorView gtokens = on_gpu(wild), gdw = on_gpu(dw);
  const Tensor x = cpu_output(DType::kBf16, {3, 16});
  const TensorView gx = gpu_output(DType::kBf16, {3, 16});
  embedding(cpu, tame, w, x);
  embedding(gpu, gtokens, on_gpu(w), gx);
  expect_same(x, gx, "clamped");
  embedding_backward(cpu, tame, dx, dw);
  embedding_backward(gpu, gtokens, on_gpu(dx), gdw);
  expect_same(dw, gdw, "clamped, dw");
}

}  // namespace
}  // namespace lockstep::ops::test

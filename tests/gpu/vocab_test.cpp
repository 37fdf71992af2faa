// ops/vocab.h on the GPU: tokens, stats and gradients have the CPU's bytes, for every vocabulary
// size, filter and kind of row, in a captured graph as well.
#include "ops/vocab.h"

#include <cuda_runtime_api.h>

#include "gpu/gpu_test.h"
#include "tensor/cuda_check.h"

namespace lockstep::ops::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

RowSampling settings(float temperature, int top_k = -1, float top_p = 1, float min_p = 0) {
  RowSampling s;
  s.temperature = temperature;
  s.top_k = top_k;
  s.top_p = top_p;
  s.min_p = min_p;
  return s;
}

const std::vector<RowSampling> kPlain = {settings(1), settings(0.7f), settings(1.7f), settings(0)};
// Each filter alone, then together; a cold row's spread is wide.
const std::vector<RowSampling> kFiltered = {settings(1, 1),
                                            settings(1, 5),
                                            settings(0.1f, 50),
                                            settings(1, 3000),
                                            settings(0.7f, -1, 0.9f),
                                            settings(1, -1, 0),
                                            settings(1, -1, -1),
                                            settings(5, -1, 0.9999f),
                                            settings(1, -1, 1, 0.05f),
                                            settings(1, -1, 1, 1e-30f),
                                            settings(1, -1, 1, 2),
                                            settings(1.3f, 40, 0.5f),
                                            settings(0.1f, 40, 0.99f),
                                            settings(1, 40, 1, 0.2f),
                                            settings(1, -1, 0.8f, 0.01f),
                                            settings(0.9f, 20, 0.8f, 0.01f),
                                            settings(1, 100000, 0.999f),
                                            settings(0, 3, 0.5f, 0.5f)};

std::vector<RowSampling> rows_of(std::int64_t R, const std::vector<RowSampling>& kinds,
                                 std::uint64_t seed) {
  std::vector<RowSampling> all;
  for (std::int64_t r = 0; r < R; ++r) {
    all.push_back(kinds[static_cast<std::size_t>(r) % kinds.size()]);
    all.back().seed = seed * 0x9E3779B97F4A7C15u + 77;
    all.back().stream = static_cast<std::uint64_t>(r) << 33 | 5;
    all.back().position = static_cast<std::uint32_t>(r * 3);
  }
  return all;
}

std::vector<RowSampling> mixed(std::int64_t R, std::uint64_t seed) {
  std::vector<RowSampling> kinds;
  for (std::size_t i = 0; i < kFiltered.size(); ++i) {
    kinds.push_back(kFiltered[i]);
    kinds.push_back(kPlain[i % kPlain.size()]);
  }
  return rows_of(R, kinds, seed);
}

enum class Logits { kNormal, kTies, kCoarse, kPeaked, kHuge, kSame };

// Some of kNormal and kTies are -inf or equal to their neighbour; kCoarse has few different values,
// so that a cut falls between many equal tokens; kPeaked has one likely token; kHuge drowns noise.
Tensor make_logits(std::int64_t R, std::int64_t V, Logits kind, std::uint64_t seed) {
  Rng rng(seed);
  Tensor out = empty(DType::kFp32, {R, V});
  float* z = out.as<float>();
  for (std::int64_t i = 0; i < R * V; ++i) {
    const double chance = uniform(rng);
    float x = normal(rng) * 3;
    if (kind == Logits::kCoarse) x = std::floor(x) * 0.5f;
    if (kind == Logits::kSame) x = i % 3 == 0 ? 0.0f : -0.0f;
    if (kind == Logits::kPeaked && i % V == V / 2) x = 60;
    if (kind == Logits::kHuge) x = x * 1e30f;
    z[i] = x;
    if (kind != Logits::kTies || i % V == 0) continue;
    if (chance < 0.05) z[i] = -kInf;
    if (chance > 0.9) z[i] = z[i - 1];
  }
  return out;
}

class VocabGpu : public GpuTest {
 protected:
  template <typename T>
  TensorView structs_on_gpu(const std::vector<T>& from) {
    Tensor bytes = empty(DType::kE4m3, {static_cast<std::int64_t>(from.size() * sizeof(T))});
    if (!from.empty()) std::memcpy(bytes.view().data, from.data(), from.size() * sizeof(T));
    return on_gpu(bytes);
  }
  TensorView gpu_stats(std::int64_t R) {
    return gpu_output(DType::kE4m3, {R * static_cast<std::int64_t>(sizeof(RowStats))});
  }
  static RowStats* stats_of(const TensorView& view) { return static_cast<RowStats*>(view.data); }

  void expect_same_stats(const std::vector<RowStats>& want, const TensorView& device,
                         const std::vector<RowSampling>& sampling, const std::string& what) {
    const Tensor bytes = from_gpu(device);
    std::vector<RowStats> got(want.size());
    if (!got.empty()) std::memcpy(got.data(), bytes.view().data, got.size() * sizeof(RowStats));
    int different = 0;
    for (std::size_t r = 0; r < want.size(); ++r) {
      if (std::memcmp(&want[r], &got[r], sizeof(RowStats)) == 0) continue;
      const auto text = [](const RowStats& s) {
        return fmt::format("logprob {:a} entropy {:a} max {:a} total {:a} cut {:a}, {}", s.logprob,
                           s.entropy, s.max, s.total, s.cut_z, s.cut_index);
      };
      const RowSampling& s = sampling[r];
      if (++different <= 3)
        ADD_FAILURE() << what << " row " << r
                      << fmt::format(": T {} top_k {} top_p {} min_p {}\n  CPU ", s.temperature,
                                     s.top_k, s.top_p, s.min_p)
                      << text(want[r]) << "\n  GPU " << text(got[r]);
    }
    EXPECT_EQ(different, 0) << what << " of " << want.size() << " rows";
  }

  // Sampling, the stats of the drawn tokens and of others, and the gradient.
  void compare(const Tensor& logits, const std::vector<RowSampling>& sampling,
               const std::string& what, bool with_backward = true) {
    if (left_out(5)) return;
    const std::int64_t R = logits.view().dim(0), V = logits.view().dim(1);
    const std::size_t count = static_cast<std::size_t>(R);
    Rng rng(3);
    const Tensor tokens = cpu_output(DType::kInt32, {R});
    std::vector<RowStats> stats(count), others(count);
    vocab_sample(cpu, logits, sampling.data(), tokens, stats.data());
    Tensor targets = empty(DType::kInt32, {R}), g = random_normal(rng, DType::kFp32, {R});
    for (std::int64_t r = 0; r < R; ++r) {
      targets.as<std::int32_t>()[r] = static_cast<std::int32_t>(uniform_int(rng, 0, V - 1));
      if (r % 11 == 10) g.as<float>()[r] = r % 2 == 0 ? 0.0f : -0.0f;
    }
    vocab_logprobs(cpu, logits, targets, sampling.data(), others.data());

    const TensorView gpu_logits = on_gpu(logits), gpu_tokens = gpu_output(DType::kInt32, {R}),
                     gpu_targets = on_gpu(targets), gpu_rows = structs_on_gpu(sampling),
                     first = gpu_stats(R), second = gpu_stats(R), third = gpu_stats(R);
    const auto* rows = static_cast<const RowSampling*>(gpu_rows.data);
    vocab_sample(gpu, gpu_logits, rows, gpu_tokens, stats_of(first));
    vocab_logprobs(gpu, gpu_logits, gpu_tokens, rows, stats_of(second));
    vocab_logprobs(gpu, gpu_logits, gpu_targets, rows, stats_of(third));
    expect_same(tokens, gpu_tokens, what + ": tokens");
    expect_same_stats(stats, first, sampling, what + ": sampled");
    expect_same_stats(others, third, sampling, what + ": targets");
    bool broken = false;
    for (const RowStats& s : stats) broken = broken || std::isnan(s.max);
    if (!broken) expect_same_stats(stats, second, sampling, what + ": sampled, again");
    if (!with_backward) return;
    for (const bool drawn : {true, false}) {
      const Tensor d_logits = cpu_output(DType::kBf16, {R, V});
      const TensorView gpu_d_logits = gpu_output(DType::kBf16, {R, V}), gpu_g = on_gpu(g);
      vocab_backward(cpu, logits, drawn ? tokens : targets, sampling.data(),
                     drawn ? stats.data() : others.data(), g, d_logits);
      vocab_backward(gpu, gpu_logits, drawn ? gpu_tokens : gpu_targets, rows,
                     stats_of(drawn ? first : third), gpu_g, gpu_d_logits);
      expect_same(d_logits, gpu_d_logits, what + ": gradient");
    }
  }
};

TEST_F(VocabGpu, SameBytesAsTheCpu) {
  for (const std::int64_t V : {1, 2, 3, 5, 8, 127, 128, 129, 257, 1000, 1024, 1031, 4099, 8192})
    for (const std::int64_t R : {0, 1, 37})
      for (const Logits kind : {Logits::kNormal, Logits::kTies})
        compare(make_logits(R, V, kind, static_cast<std::uint64_t>(V + R)), mixed(R, 1),
                fmt::format("V {} R {} kind {}", V, R, static_cast<int>(kind)));
}

TEST_F(VocabGpu, OddDistributions) {
  for (const std::int64_t V : {129, 4099, 20000})
    for (const Logits kind : {Logits::kCoarse, Logits::kPeaked, Logits::kHuge, Logits::kSame})
      compare(make_logits(37, V, kind, static_cast<std::uint64_t>(V)), mixed(37, 2),
              fmt::format("V {} kind {}", V, static_cast<int>(kind)));
}

// All settings at the sizes of real models.
TEST_F(VocabGpu, ALargeVocabulary) {
  for (const std::int64_t V : {151936, 128256, 262144, 262147})
    for (const Logits kind : {Logits::kNormal, Logits::kCoarse, Logits::kPeaked}) {
      if (V != 151936 && kind != Logits::kNormal) continue;
      const std::int64_t R = V == 151936 ? 37 : 13;
      compare(make_logits(R, V, kind, static_cast<std::uint64_t>(V)), mixed(R, 3),
              fmt::format("V {} kind {}", V, static_cast<int>(kind)), kind == Logits::kNormal);
    }
}

// Rows in more parts and rows in one part: the division of the work follows from R.
TEST_F(VocabGpu, ManyRows) {
  const std::int64_t R = few_sizes() ? 331 : 3001;
  compare(make_logits(R, 1031, Logits::kTies, 5), mixed(R, 4), fmt::format("{} rows", R));
  compare(make_logits(997, 6000, Logits::kNormal, 6), rows_of(997, kPlain, 5), "997 plain rows",
          false);
}

TEST_F(VocabGpu, TokensOfManySeeds) {
  const std::int64_t R = 31, V = 3001;
  const Tensor logits = make_logits(R, V, Logits::kNormal, 9);
  const TensorView gpu_logits = on_gpu(logits), stats = gpu_stats(R);
  const Tensor tokens = cpu_output(DType::kInt32, {R});
  std::vector<RowStats> cpu_stats(static_cast<std::size_t>(R));
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    if (left_out(7)) continue;
    const auto sampling = mixed(R, seed);
    const TensorView rows = structs_on_gpu(sampling), gpu_tokens = gpu_output(DType::kInt32, {R});
    vocab_sample(cpu, logits, sampling.data(), tokens, cpu_stats.data());
    vocab_sample(gpu, gpu_logits, static_cast<const RowSampling*>(rows.data), gpu_tokens,
                 stats_of(stats));
    expect_same(tokens, gpu_tokens, fmt::format("seed {}", seed));
  }
}

TEST_F(VocabGpu, BrokenRows) {
  for (const std::int64_t V : {1, 5, 300, 4100}) {
    Tensor logits = make_logits(37, V, Logits::kNormal, 11);
    for (std::int64_t r = 0; r < 37; ++r) {
      float* z = logits.as<float>() + r * V;
      if (r % 6 == 1) z[V / 2] = kNan;
      if (r % 6 == 2) z[V - 1] = kInf;
      if (r % 6 == 3) std::fill(z, z + V, -kInf);
      if (r % 6 == 4) std::fill(z, z + V * 3 / 4 + 1, kNan);
      if (r % 6 == 5) std::fill(z, z + V, kNan), z[V - 1] = -kInf;
    }
    compare(logits, mixed(37, 6), fmt::format("V {}", V));
  }
}

// A row whose tokens but a few are -inf, wherever these lie.
TEST_F(VocabGpu, FewFiniteLogits) {
  for (const std::int64_t V : {257, 5000}) {
    Tensor logits = empty(DType::kFp32, {37, V});
    Rng rng(12);
    std::fill(logits.as<float>(), logits.as<float>() + 37 * V, -kInf);
    for (std::int64_t r = 0; r < 37; ++r)
      for (int i = 0; i <= r % 5; ++i)
        logits.as<float>()[r * V + uniform_int(rng, 0, V - 1)] = normal(rng);
    compare(logits, mixed(37, 7), fmt::format("V {}", V));
  }
}

// A replayed graph reads the rows' settings anew: the launches do not depend on them.
TEST_F(VocabGpu, AGraphServesOtherSettings) {
  const std::int64_t R = 17, V = 5000;
  const Tensor logits = make_logits(R, V, Logits::kTies, 13);
  const TensorView gpu_logits = on_gpu(logits), gpu_tokens = gpu_output(DType::kInt32, {R}),
                   stats = gpu_stats(R), rows = structs_on_gpu(rows_of(R, kPlain, 1));
  const auto sample = [&] {
    vocab_sample(gpu, gpu_logits, static_cast<const RowSampling*>(rows.data), gpu_tokens,
                 stats_of(stats));
  };
  sample();  // the workspace grows outside the graph
  const cudaStream_t stream = tensor::stream_of(gpu);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  tensor::check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  sample();
  tensor::check_cuda(cudaStreamEndCapture(stream, &graph), "capture");
  tensor::check_cuda(cudaGraphInstantiate(&replay, graph, 0), "instantiate");
  for (const auto& sampling : {rows_of(R, kFiltered, 3), rows_of(R, kPlain, 4), mixed(R, 5)}) {
    tensor::copy_bytes(gpu, sampling.data(), Device::kCpu, rows.data, Device::kCuda,
                       sampling.size() * sizeof(RowSampling));
    tensor::check_cuda(cudaGraphLaunch(replay, stream), "replay");
    const Tensor tokens = cpu_output(DType::kInt32, {R});
    std::vector<RowStats> want(static_cast<std::size_t>(R));
    vocab_sample(cpu, logits, sampling.data(), tokens, want.data());
    expect_same(tokens, gpu_tokens, "tokens of a graph");
    expect_same_stats(want, stats, sampling, "graph");
  }
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
}

}  // namespace
}  // namespace lockstep::ops::test

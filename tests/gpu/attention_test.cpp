#include "ops/attention.h"

#include "gpu/gpu_test.h"
#include "gpu/served_case.h"
#include "tensor/cuda_check.h"

namespace lockstep::ops::test {
namespace {

class AttentionGpu : public GpuTest {
 protected:
  // Equal bytes of the training form, forward and backward.
  void expect_same_training(const AttentionCase& x, bool backward, bool bounds) {
    if (left_out(3)) return;
    const AttentionSizes& n = x.sizes;
    std::string what = text(n) + " lengths";
    for (const std::int64_t length : x.lengths) what += ' ' + std::to_string(length);
    const Shape out_shape{x.T(), n.H, n.Kv}, rows{x.T(), n.H};
    const Tensor out = cpu_output(DType::kBf16, out_shape), lse2 = cpu_output(DType::kFp32, rows);
    attention(cpu, x.q_THK, x.k_TJK, x.v(), x.batch(), n.scale, out, lse2);
    AttentionBatch batch{on_gpu(x.offsets_S1), on_gpu(x.lengths_S), {}, 0};
    if (bounds)
      for (const std::int64_t length : x.lengths)
        batch.max_queries = batch.max_keys = std::max(batch.max_keys, length);
    const TensorView q = on_gpu(x.q_THK), k = on_gpu(x.k_TJK), v = on_gpu(x.v());
    const TensorView gpu_out = gpu_output(DType::kBf16, out_shape),
                     gpu_lse2 = gpu_output(DType::kFp32, rows);
    attention(gpu, q, k, v, batch, n.scale, gpu_out, gpu_lse2);
    expect_same(out, gpu_out, "out, " + what);
    expect_same(lse2, gpu_lse2, "lse2, " + what);
    if (!backward) return;
    Rng rng(77);
    const Tensor d_out = random_normal(rng, DType::kBf16, out_shape);
    const Shape q_shape = x.q_THK.view().shape, k_shape = x.k_TJK.view().shape,
                v_shape = x.v_TJK.view().shape;
    const Tensor d_q = cpu_output(DType::kBf16, q_shape), d_k = cpu_output(DType::kBf16, k_shape),
                 d_v = cpu_output(DType::kBf16, v_shape);
    attention_backward(cpu, x.q_THK, x.k_TJK, x.v(), out, lse2, d_out, x.batch(), n.scale, d_q, d_k,
                       n.latent ? TensorView{} : d_v.view());
    const TensorView gpu_d_q = gpu_output(DType::kBf16, q_shape),
                     gpu_d_k = gpu_output(DType::kBf16, k_shape),
                     gpu_d_v = gpu_output(DType::kBf16, v_shape);
    attention_backward(gpu, q, k, v, on_gpu(out), on_gpu(lse2), on_gpu(d_out), batch, n.scale,
                       gpu_d_q, gpu_d_k, n.latent ? TensorView{} : gpu_d_v);
    expect_same(d_q, gpu_d_q, "d_q, " + what);
    expect_same(d_k, gpu_d_k, "d_k, " + what);
    if (!n.latent) expect_same(d_v, gpu_d_v, "d_v, " + what);
  }

  // Equal bytes of a served batch; rows of no sequence keep theirs.
  void expect_same_served(const ServedCase& x, bool bounds) {
    if (left_out(7)) return;
    const AttentionSizes& n = x.sizes;
    std::string what = text(n) + " page " + std::to_string(x.page_size) + " parts";
    for (const Part& p : x.parts)
      what += ' ' + std::to_string(p.queries) + '/' + std::to_string(p.keys);
    const std::int64_t T = x.q_THK.view().dim(0);
    const Tensor out = cpu_output(DType::kBf16, {T, n.H, n.Kv}),
                 lse2 = cpu_output(DType::kFp32, {T, n.H});
    attention(cpu, x.q_THK, x.k_RJK, n.latent ? TensorView{} : x.v_RJK.view(),
              {x.offsets_S1, x.lengths_S, x.pages_SP, x.page_size}, n.scale, out, lse2);
    AttentionBatch batch{on_gpu(x.offsets_S1), on_gpu(x.lengths_S), on_gpu(x.pages_SP),
                         x.page_size};
    if (bounds) {
      batch.max_queries = x.max_queries;
      batch.max_keys = x.max_keys;
    }
    const TensorView gpu_out = gpu_output(DType::kBf16, {T, n.H, n.Kv}),
                     gpu_lse2 = gpu_output(DType::kFp32, {T, n.H});
    attention(gpu, on_gpu(x.q_THK), on_gpu(x.k_RJK), n.latent ? TensorView{} : on_gpu(x.v_RJK),
              batch, n.scale, gpu_out, gpu_lse2);
    expect_same(out, gpu_out, "out, " + what);
    expect_same(lse2, gpu_lse2, "lse2, " + what);
  }
};

const AttentionSizes kSizes[] = {
    {2, 2, 16, 16, 0.25},   {4, 2, 32, 32, 0.176}, {8, 2, 64, 64, 0.125},  {8, 1, 128, 128, 0.088},
    {3, 1, 128, 128, 0.09}, {2, 1, 96, 80, 0.1},   {2, 2, 192, 128, 0.07}, {2, 1, 256, 256, 0.0625},
    {1, 1, 48, 256, 0.14},  {17, 1, 64, 64, 0.125}};

const AttentionSizes kLatent[] = {
    {2, 1, 576, 512, 0.0417, true}, {8, 1, 160, 128, 0.08, true},  {70, 1, 64, 48, 0.125, true},
    {6, 3, 128, 128, 0.09, true},   {4, 2, 80, 16, 0.11, true},    {128, 1, 48, 32, 0.14, true},
    {1, 1, 512, 512, 0.044, true},  {3, 1, 528, 272, 0.044, true}, {5, 1, 16, 16, 0.25, true}};

TEST_F(AttentionGpu, TrainingHasTheBytesOfTheCpu) {
  Rng rng(1);
  for (const AttentionSizes& n : kSizes) {
    expect_same_training(attention_case(rng, n, {1}), true, true);
    expect_same_training(attention_case(rng, n, {1, 2, 15, 16, 17, 63, 64, 65}), true, true);
    expect_same_training(attention_case(rng, n, {127, 128, 129}), true, false);
    expect_same_training(attention_case(rng, n, {0, 300, 0, 3, 191}), true, true);
  }
}

TEST_F(AttentionGpu, TrainingHasTheBytesOfTheCpuAtExtremeScores) {
  Rng rng(2);
  for (const double deviation : {1e-30, 40.0, 3e4})
    for (const std::int64_t K : {32, 64, 128})
      expect_same_training(attention_case(rng, {2, 1, K, K, 0.3}, {130, 300}, deviation), true,
                           true);
}

TEST_F(AttentionGpu, TrainingHasTheBytesOfTheCpuAcrossSplits) {
  Rng rng(3);
  for (const std::int64_t length : {2047, 2048, 2049, 4130})
    for (const AttentionSizes& n :
         {AttentionSizes{1, 1, 64, 64, 0.125}, AttentionSizes{2, 1, 128, 128, 0.088}})
      expect_same_training(attention_case(rng, n, {5, length}), length == 2049, true);
}

TEST_F(AttentionGpu, EmptyBatches) {
  Rng rng(4);
  for (const std::vector<std::int64_t>& lengths : {std::vector<std::int64_t>{}, {0, 0}})
    for (const AttentionSizes& n : {kSizes[2], kLatent[0]})
      expect_same_training(attention_case(rng, n, lengths), true, true);
}

// Values in keys: widths of DeepSeek-V3 and of small models, panels that end early, several KV
// heads, groups that leave tiles of 64 rows or fill more than one.
TEST_F(AttentionGpu, LatentTrainingHasTheBytesOfTheCpu) {
  Rng rng(21);
  for (const AttentionSizes& n : kLatent) {
    expect_same_training(attention_case(rng, n, {1}), true, true);
    expect_same_training(attention_case(rng, n, {1, 2, 15, 16, 17, 63, 64, 65}), true, true);
    expect_same_training(attention_case(rng, n, {0, 127, 128, 129, 0}), true, false);
  }
  expect_same_training(attention_case(rng, kLatent[1], {0, 300, 0, 3, 191}), true, true);
  for (const double deviation : {1e-30, 40.0, 3e4})
    expect_same_training(attention_case(rng, {3, 1, 576, 512, 0.04, true}, {140}, deviation), true,
                         true);
}

// Moonlight's and DeepSeek-V2-Lite's heads: four tokens a tile.
TEST_F(AttentionGpu, LatentTilesOfSeveralTokensHaveTheBytesOfTheCpu) {
  Rng rng(26);
  const AttentionSizes n{16, 1, 576, 512, 0.0417, true};
  expect_same_training(attention_case(rng, n, {130, 3, 66, 1}), true, true);
  expect_same_served(served_case(rng, n, {{1, 77}, {9, 90}, {66, 130}, {2, 260}}, 16), true);
  expect_same_training(attention_case(rng, {32, 1, 64, 64, 0.125, true}, {300, 5}), true, false);
}

// Heads that fill an even number of tiles: two thread blocks share a token's keys.
TEST_F(AttentionGpu, LatentPairsOfTilesHaveTheBytesOfTheCpu) {
  Rng rng(25);
  expect_same_training(attention_case(rng, {128, 1, 576, 512, 0.0417, true}, {3, 140}), true, true);
  expect_same_training(attention_case(rng, {130, 2, 80, 64, 0.11, true}, {300, 1}), true, true);
  expect_same_training(attention_case(rng, {200, 1, 32, 32, 0.17, true}, {260}), true, false);
}

TEST_F(AttentionGpu, LatentTrainingHasTheBytesOfTheCpuAcrossSplits) {
  Rng rng(22);
  for (const std::int64_t length : {2047, 2049, 4130})
    expect_same_training(attention_case(rng, {1, 1, 48, 32, 0.14, true}, {5, length}),
                         length == 2049, true);
}

TEST_F(AttentionGpu, LatentServedHasTheBytesOfTheCpu) {
  Rng rng(23);
  for (const AttentionSizes& n : kLatent)
    for (const std::int64_t page_size : {1, 7, 16, 64, 128}) {
      if (n.H > 16 && page_size != 16) continue;
      expect_same_served(
          served_case(rng, n, {{1, 1}, {1, 127}, {1, 128}, {1, 129}, {1, 300}, {0, 5}}, page_size),
          true);
      expect_same_served(
          served_case(rng, n, {{1, 77}, {9, 90}, {0, 0}, {2, 260}, {1, 1}}, page_size),
          page_size == 16);
    }
}

TEST_F(AttentionGpu, LatentServedHasTheBytesOfTheCpuAcrossSplits) {
  Rng rng(24);
  for (const std::int64_t page_size : {16, 37})
    for (const AttentionSizes& n :
         {AttentionSizes{2, 1, 576, 512, 0.04, true}, AttentionSizes{70, 1, 48, 16, 0.14, true},
          AttentionSizes{16, 1, 64, 48, 0.14, true}}) {
      // Few tiles: a CTA a split. Many: one after the other.
      expect_same_served(
          served_case(rng, n, {{1, 2047}, {1, 2048}, {1, 2049}, {1, 4097}, {1, 6200}, {1, 3}},
                      page_size),
          page_size == 16);
      expect_same_served(served_case(rng, n, {{2, 2049}, {1, 40}, {2, 4100}}, page_size), true);
      if (n.K < 100)
        expect_same_served(
            served_case(rng, n, {{90, 2100}, {1, 2050}, {0, 0}, {3, 4200}}, page_size), true);
    }
}

TEST_F(AttentionGpu, ServedHasTheBytesOfTheCpu) {
  Rng rng(5);
  for (const AttentionSizes& n : kSizes)
    for (const std::int64_t page_size : {1, 7, 16, 64, 128}) {
      const std::vector<Part> decode{{1, 1}, {1, 127}, {1, 128}, {1, 129}, {1, 300}, {0, 5}};
      const std::vector<Part> prefill{{70, 70}, {64, 200}, {129, 131}};
      const std::vector<Part> mixed{{1, 77}, {33, 90}, {0, 0}, {2, 260}, {128, 300}, {1, 1}};
      expect_same_served(served_case(rng, n, decode, page_size), true);
      expect_same_served(served_case(rng, n, prefill, page_size), page_size == 16);
      expect_same_served(served_case(rng, n, mixed, page_size), page_size != 16);
    }
}

TEST_F(AttentionGpu, ServedHasTheBytesOfTheCpuAcrossSplits) {
  Rng rng(6);
  const AttentionSizes some[] = {{4, 1, 64, 64, 0.125},
                                 {8, 1, 128, 128, 0.088},
                                 {2, 2, 256, 256, 0.06},
                                 {32, 1, 64, 32, 0.125}};
  for (const AttentionSizes& n : some)
    for (const std::int64_t page_size : {16, 37}) {
      expect_same_served(
          served_case(rng, n, {{1, 2047}, {1, 2048}, {1, 2049}, {1, 4097}, {1, 6200}, {1, 3}},
                      page_size),
          page_size == 16);
      expect_same_served(served_case(rng, n, {{2, 2049}, {1, 40}, {9, 4100}, {2, 4097}}, page_size),
                         true);
      if (n.J == 1 && n.K <= 128)
        expect_same_served(
            served_case(rng, n, {{100, 2100}, {1, 2050}, {0, 0}, {129, 4200}}, page_size), true);
    }
}

// One captured launch serves batches whose lengths change in place, within its bounds.
TEST_F(AttentionGpu, ReplaysFromAGraph) {
  Rng rng(11);
  for (const AttentionSizes& n :
       {AttentionSizes{8, 2, 128, 128, 0.088}, AttentionSizes{4, 2, 32, 32, 0.176},
        AttentionSizes{4, 1, 160, 128, 0.08, true}}) {
    const ServedCase x = served_case(rng, n, {{1, 2300}, {1, 700}, {1, 2048}}, 16);
    const std::int64_t T = x.q_THK.view().dim(0);
    const TensorView q = on_gpu(x.q_THK), k = on_gpu(x.k_RJK),
                     v = n.latent ? TensorView{} : on_gpu(x.v_RJK), lengths_S = on_gpu(x.lengths_S);
    const AttentionBatch batch{on_gpu(x.offsets_S1), lengths_S, on_gpu(x.pages_SP), 16, 1, 2300};
    const TensorView out = gpu_output(DType::kBf16, {T, n.H, n.Kv}),
                     lse2 = gpu_output(DType::kFp32, {T, n.H});
    const auto run = [&] { attention(gpu, q, k, v, batch, n.scale, out, lse2); };
    run();  // takes the workspace
    const cudaStream_t stream = tensor::stream_of(gpu);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    tensor::check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    run();
    tensor::check_cuda(cudaStreamEndCapture(stream, &graph), "capture");
    tensor::check_cuda(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
    for (const std::vector<std::int32_t>& lengths :
         {std::vector<std::int32_t>{1, 700, 2048}, {2299, 1, 128}, {2048, 127, 2047}}) {
      const Tensor changed = int32_tensor(lengths);
      tensor::copy(gpu, changed, lengths_S);
      tensor::check_cuda(cudaGraphLaunch(exec, stream), "launch");
      const Tensor cpu_out = cpu_output(DType::kBf16, {T, n.H, n.Kv}),
                   cpu_lse2 = cpu_output(DType::kFp32, {T, n.H});
      attention(cpu, x.q_THK, x.k_RJK, n.latent ? TensorView{} : x.v_RJK.view(),
                {x.offsets_S1, changed, x.pages_SP, 16}, n.scale, cpu_out, cpu_lse2);
      expect_same(cpu_out, out, "out, " + text(n));
      expect_same(cpu_lse2, lse2, "lse2, " + text(n));
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
  }
}

// A sequence's rows have the same bytes alone and in batches.
TEST_F(AttentionGpu, DecodeDoesNotDependOnTheBatch) {
  Rng rng(7);
  const AttentionSizes n{8, 2, 128, 128, 0.088};
  for (const std::int64_t S : {1, 2, 31, 33}) {
    std::vector<Part> parts;
    for (std::int64_t s = 0; s < S; ++s) parts.push_back({1, uniform_int(rng, 1, 900)});
    expect_same_served(served_case(rng, n, parts, 16), true);
  }
}

// Decode over pages gives the rows of the packed forward, at lengths too long for the CPU.
TEST_F(AttentionGpu, DecodeHasTheBytesOfTraining) {
  Rng rng(8);
  for (const AttentionSizes& n :
       {AttentionSizes{8, 2, 128, 128, 0.088}, AttentionSizes{16, 2, 64, 64, 0.125},
        AttentionSizes{20, 1, 576, 512, 0.0417, true}}) {
    const std::int64_t L = few_sizes() ? 2500 : 9000, S = few_sizes() ? 10 : 40;
    const Tensor q = random_normal(rng, DType::kBf16, {L, n.H, n.K}),
                 k = random_normal(rng, DType::kBf16, {L, n.J, n.K}),
                 v = random_normal(rng, DType::kBf16, {L, n.J, n.Kv});
    const TensorView gpu_q = on_gpu(q), gpu_k = on_gpu(k),
                     gpu_v = n.latent ? TensorView{} : on_gpu(v);
    const TensorView whole = gpu_output(DType::kBf16, {L, n.H, n.Kv}),
                     whole_lse2 = gpu_output(DType::kFp32, {L, n.H});
    attention(gpu, gpu_q, gpu_k, gpu_v,
              {on_gpu(int32_tensor({0, static_cast<std::int32_t>(L)})),
               on_gpu(int32_tensor({static_cast<std::int32_t>(L)})),
               {},
               0},
              n.scale, whole, whole_lse2);
    const Tensor all = from_gpu(whole), all_lse2 = from_gpu(whole_lse2);
    std::vector<std::int32_t> offsets{0}, lengths, pages;
    std::vector<std::int64_t> positions;
    Tensor some(Device::kCpu, DType::kBf16, {S, n.H, n.K}),
        expected(Device::kCpu, DType::kBf16, {S, n.H, n.Kv}),
        expected_lse2(Device::kCpu, DType::kFp32, {S, n.H});
    const auto copy_row = [](const Tensor& from, std::int64_t i, const Tensor& to, std::int64_t t) {
      std::memcpy(to.view().rows(t, 1).data, from.view().rows(i, 1).data,
                  to.view().rows(t, 1).bytes());
    };
    for (std::int64_t s = 0; s < S; ++s) {
      const std::int64_t position = s < 9 ? L - 1 - s : uniform_int(rng, 0, L - 1);
      offsets.push_back(static_cast<std::int32_t>(s + 1));
      lengths.push_back(static_cast<std::int32_t>(position + 1));
      for (std::int64_t p = 0; p < L / 20; ++p) pages.push_back(static_cast<std::int32_t>(p));
      copy_row(q, position, some, s);
      copy_row(all, position, expected, s);
      copy_row(all_lse2, position, expected_lse2, s);
    }
    Tensor table(Device::kCpu, DType::kInt32, {S, L / 20});
    std::memcpy(table.view().data, pages.data(), pages.size() * sizeof(std::int32_t));
    const TensorView out = gpu_output(DType::kBf16, {S, n.H, n.Kv}),
                     lse2 = gpu_output(DType::kFp32, {S, n.H});
    attention(gpu, on_gpu(some), gpu_k, gpu_v,
              {on_gpu(int32_tensor(offsets)), on_gpu(int32_tensor(lengths)), on_gpu(table), 20, 1},
              n.scale, out, lse2);
    expect_same(expected, out, "out, " + text(n));
    expect_same(expected_lse2, lse2, "lse2, " + text(n));
  }
}

TEST_F(AttentionGpu, WritesKeysAndValues) {
  Rng rng(9);
  for (const std::int64_t T : {0, 1, 9, 100})
    for (const std::int64_t K : {3, 16, 128}) {
      const std::int64_t J = 2, R = 2 * T + 5;
      const Tensor k = random_normal(rng, DType::kBf16, {T, J, K}),
                   v = random_normal(rng, DType::kBf16, {T, J, 2 * K});
      std::vector<std::int32_t> slots;
      for (std::int64_t t = 0; t < T; ++t)
        slots.push_back(static_cast<std::int32_t>(R - 2 - 2 * t));
      const Tensor slots_T = int32_tensor(slots);
      const Tensor k_cache = cpu_output(DType::kBf16, {R, J, K}),
                   v_cache = cpu_output(DType::kBf16, {R, J, 2 * K});
      const TensorView gpu_k = gpu_output(DType::kBf16, {R, J, K}),
                       gpu_v = gpu_output(DType::kBf16, {R, J, 2 * K});
      write_kv(cpu, k, v, slots_T, k_cache, v_cache);
      write_kv(gpu, on_gpu(k), on_gpu(v), on_gpu(slots_T), gpu_k, gpu_v);
      expect_same(k_cache, gpu_k, "k");
      expect_same(v_cache, gpu_v, "v");
    }
}

TEST_F(AttentionGpu, RefusesWidthsItDoesNotHave) {
  Rng rng(10);
  for (const AttentionSizes& n :
       {AttentionSizes{2, 1, 24, 16, 0.2}, AttentionSizes{1, 1, 16, 272, 0.2}}) {
    const AttentionCase x = attention_case(rng, n, {4});
    const TensorView out = gpu_output(DType::kBf16, {4, n.H, n.Kv});
    EXPECT_THROW(attention(gpu, on_gpu(x.q_THK), on_gpu(x.k_TJK), on_gpu(x.v_TJK),
                           {on_gpu(x.offsets_S1), on_gpu(x.lengths_S), {}, 0}, n.scale, out, {}),
                 base::ContractError);
  }
}

}  // namespace
}  // namespace lockstep::ops::test

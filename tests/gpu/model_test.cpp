// The whole policy and the whole rollout on the GPU against the CPU: forward, loss, backward and
// optimizer of a small model, by bytes.
#include <cmath>

#include "gpu/gpu_test.h"
#include "model/families.h"
#include "policy/tiny_model.h"
#include "rollout/engine.h"
#include "rollout/tiny_model.h"
#include "sync/refit.h"

namespace lockstep::policy::test {
namespace {

using ModelGpu = ops::test::GpuTest;

model::Precision precision_of(bool fp8, model::Recipe recipe = model::Recipe::kBlockwise,
                              bool pow2 = false) {
  model::Precision p;
  p.fp8 = fp8;
  p.recipe = recipe;
  p.weight_pow2 = p.activation_pow2 = pow2;
  return p;
}

struct Trained {
  std::vector<std::string> checksums;
  std::vector<Logprobs> logprobs;
  std::vector<double> norms, aux;
  std::string master, grads;
};

std::string bytes(const tensor::TensorView& view) {
  const tensor::Tensor host = tensor::to_host(view);
  return {static_cast<const char*>(host.view().data), host.view().bytes()};
}

// Optimizer steps of one, two and three micro-batches.
Trained train(const tensor::Context& ctx, const PolicyOptions& options,
              const model::ModelConfig& config = tiny_config()) {
  auto weights = tiny_weights(1, config);
  model::move_to(ctx, *weights);
  Policy p = make_policy(ctx, weights, options);
  Trained out;
  for (int step = 0; step < 3; ++step) {
    begin_step(p);
    tensor::fill_bytes(ctx, p.grads, 0xFF);  // NaN: nothing reads what was there before
    for (int micro = 0; micro <= step; ++micro) {
      // A first micro-batch of few tokens leaves experts without any.
      const auto sequences =
          random_sequences(5, micro == 0 && step == 1 ? 2 : 150, 10 * step + micro);
      out.logprobs.push_back(
          accumulate(p, sequences, 0.5, {}, mean_loss(sequences, count_tokens(sequences))));
    }
    out.grads = bytes(p.grads);
    const StepResult r = finish_step(p, 1e-3);
    EXPECT_FALSE(r.skipped) << r.skip_reason;
    out.norms.push_back(r.grad_norm);
    out.aux.push_back(r.aux_loss);
    out.checksums.push_back(sync::weight_checksum(p.view()));
  }
  out.master = bytes(p.master);
  return out;
}

void expect_equal(const Trained& cpu, const Trained& gpu, const std::string& what) {
  EXPECT_TRUE(cpu.logprobs == gpu.logprobs) << what;
  EXPECT_EQ(cpu.norms, gpu.norms) << what;
  EXPECT_EQ(cpu.aux, gpu.aux) << what;
  EXPECT_EQ(cpu.checksums, gpu.checksums) << what;
  EXPECT_TRUE(cpu.grads == gpu.grads) << what << ": gradients of the last step";
  EXPECT_TRUE(cpu.master == gpu.master) << what << ": masters";
}

TEST_F(ModelGpu, TrainsToTheSameBits) {
  const std::pair<const char*, model::Precision> cases[] = {
      {"bf16", precision_of(false)},
      {"fp8 blockwise", precision_of(true)},
      {"fp8 rowwise", precision_of(true, model::Recipe::kRowwise)},
      {"fp8 tensorwise", precision_of(true, model::Recipe::kTensorwise)},
      {"fp8 blockwise, powers of two", precision_of(true, model::Recipe::kBlockwise, true)}};
  for (const auto& [name, precision] : cases) {
    PolicyOptions options;
    options.precision = precision;
    options.aux_loss_coeff = 0.01;
    options.bias_update_rate = 0.001;
    expect_equal(train(cpu, options), train(gpu, options), name);
  }
}

TEST_F(ModelGpu, EveryFamilyTrainsToTheSameBits) {
  for (const model::FamilyCase& f : model::family_cases(tiny_config()))
    for (const bool fp8 : {false, true}) {
      PolicyOptions options;
      options.precision = precision_of(fp8);
      options.aux_loss_coeff = 0.01;
      options.bias_update_rate = 0.001;
      options.activation_checkpointing = fp8;
      expect_equal(train(cpu, options, f.config), train(gpu, options, f.config),
                   fmt::format("{}, fp8 {}", f.name, fp8));
    }
}

// DeepSeek-V3's own widths of a head, which take kernels of their own.
model::ModelConfig deepseek_widths(model::ModelConfig base) {
  for (const model::FamilyCase& f : model::family_cases(base))
    if (is_latent(f.config)) {
      base = f.config;
      break;
    }
  base.head_dim = 64;
  base.latent = {512, 192, 128, 128, true};
  return base;
}

TEST_F(ModelGpu, DeepseekWidthsTrainToTheSameBits) {
  PolicyOptions options;
  options.precision = precision_of(true);
  options.bias_update_rate = 0.001;
  const model::ModelConfig config = deepseek_widths(tiny_config());
  expect_equal(train(cpu, options, config), train(gpu, options, config), "deepseek widths");
}

TEST_F(ModelGpu, RecomputingAndShortMomentsGiveTheSameBits) {
  PolicyOptions options;
  options.precision = precision_of(true);
  options.activation_checkpointing = true;
  options.bf16_moments = true;
  expect_equal(train(cpu, options), train(gpu, options), "recompute");
}

TEST_F(ModelGpu, GeneratesTheSameTokensAndLogprobs) {
  for (const bool fp8 : {false, true}) {
    std::vector<data::Trajectory> answers[2];
    for (const tensor::Context& ctx : {cpu, gpu}) {
      model::Weights weights = model::make_weights(rollout::test::tiny_config(128));
      model::initialize(weights, 1);
      model::randomize_biases(weights);
      model::move_to(ctx, weights);
      const auto quantized = model::quantized_for(ctx, weights, precision_of(fp8));
      const model::RopeTables rope = model::make_rope_tables(ctx, weights.config);
      rollout::Options options;
      options.max_num_seqs = 13;
      options.block_size = 4;
      options.num_blocks = 60;  // some are preempted
      options.max_num_batched_tokens = 29;
      options.prefill_chunk = 7;
      options.shuffle_pages = 3;
      rollout::Engine engine(ctx, options, rollout::test::letters);
      engine.set_model({&weights, quantized.get(), rope.cos_PK, rope.sin_PK}, 1);
      answers[ctx.device == tensor::Device::kCuda] =
          engine.generate(rollout::test::mixed_requests(60));
      EXPECT_GT(engine.stats().shared_prefix_tokens, 0);
    }
    ASSERT_EQ(answers[0].size(), answers[1].size());
    for (std::size_t i = 0; i < answers[0].size(); ++i) {
      EXPECT_EQ(answers[0][i].response, answers[1][i].response)
          << "fp8 " << fp8 << " request " << i;
      EXPECT_EQ(answers[0][i].logprobs, answers[1][i].logprobs)
          << "fp8 " << fp8 << " request " << i;
    }
  }
}

// Answers of one set of requests under these options.
std::vector<data::Trajectory> generate(
    const tensor::Context& ctx, const rollout::Options& options, int requests,
    std::int64_t* graph_steps = nullptr,
    const model::ModelConfig& config = rollout::test::tiny_config(128)) {
  model::Weights weights = model::make_weights(config);
  model::initialize(weights, 1);
  model::randomize_biases(weights);
  model::move_to(ctx, weights);
  const auto quantized = model::quantized_for(ctx, weights, precision_of(true));
  const model::RopeTables rope = model::make_rope_tables(ctx, weights.config);
  rollout::Engine engine(ctx, options, rollout::test::letters);
  engine.set_model({&weights, quantized.get(), rope.cos_PK, rope.sin_PK}, 1);
  auto answers = engine.generate(rollout::test::mixed_requests(requests));
  if (graph_steps != nullptr) *graph_steps = engine.stats().graph_steps;
  return answers;
}

void expect_equal(const std::vector<data::Trajectory>& a, const std::vector<data::Trajectory>& b,
                  const std::string& what) {
  ASSERT_EQ(a.size(), b.size()) << what;
  std::int64_t different = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    different += a[i].response != b[i].response || a[i].logprobs != b[i].logprobs;
  EXPECT_EQ(different, 0) << what << ": of " << a.size() << " answers";
}

TEST_F(ModelGpu, EveryFamilyGivesTheSameAnswers) {
  for (const model::FamilyCase& f : model::family_cases(rollout::test::tiny_config(128))) {
    rollout::Options o;
    o.max_num_seqs = 32;
    o.prefill_chunk = 7;
    std::int64_t graph_steps = 0;
    const auto answers = generate(gpu, o, 64, &graph_steps, f.config);
    expect_equal(generate(cpu, o, 64, nullptr, f.config), answers, f.name);
    EXPECT_GT(graph_steps, 0) << f.name;
  }
}

TEST_F(ModelGpu, DeepseekWidthsGiveTheSameAnswers) {
  const model::ModelConfig config = deepseek_widths(rollout::test::tiny_config(128));
  const auto expected = generate(cpu, {}, 64, nullptr, config);
  for (const bool eager : {false, true}) {
    rollout::Options o;
    o.max_num_seqs = 24;
    o.prefill_chunk = 7;
    o.block_size = 4;
    o.num_blocks = 120;  // some are preempted
    o.shuffle_pages = 3;
    o.enforce_eager = eager;
    std::int64_t graph_steps = 0;
    expect_equal(expected, generate(gpu, o, 64, &graph_steps, config),
                 fmt::format("deepseek widths, eager {}", eager));
    EXPECT_EQ(graph_steps == 0, eager);
  }
}

TEST_F(ModelGpu, AnswersDoNotDependOnBatchChunksPagesOrGraphs) {
  constexpr int kRequests = 512;
  rollout::Options plain;
  plain.max_num_seqs = 64;
  const auto expected = generate(cpu, plain, kRequests);
  for (const int batch : {1, 2, 31, 32, 33, 128, 512})
    for (const bool eager : {false, true}) {
      rollout::Options o;
      o.max_num_seqs = batch;
      o.enforce_eager = eager;
      o.shuffle_pages = static_cast<std::uint64_t>(batch);
      std::int64_t graph_steps = 0;
      expect_equal(expected, generate(gpu, o, kRequests, &graph_steps),
                   fmt::format("batch {}, eager {}", batch, eager));
      EXPECT_EQ(graph_steps == 0, eager);
    }
  for (const int chunk : {1, 3, 16, 17}) {
    rollout::Options o;
    o.prefill_chunk = chunk;
    o.block_size = chunk;
    o.max_num_batched_tokens = 61;
    o.enable_prefix_sharing = chunk != 3;
    o.num_blocks = 512 / chunk;
    expect_equal(expected, generate(gpu, o, kRequests), fmt::format("chunks of {}", chunk));
  }
}

}  // namespace
}  // namespace lockstep::policy::test

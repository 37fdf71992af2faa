// Whole runs on the GPU: pretraining and reinforcement learning give the CPU's weights, keep to
// their memory plan, and go on from their last checkpoint when the GPU fails under them.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>

#include "gpu/trap.h"
#include "loop/pretrain.h"
#include "loop/rl_loop.h"
#include "loop/run_data.h"
#include "model/checkpoint.h"
#include "model/tokenizer.h"
#include "tensor/device.h"

namespace lockstep::loop::test {
namespace {

namespace fs = std::filesystem;

// A folder that a child process of the same test finds again.
class RunGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const std::string problem = tensor::cuda_problem(); !problem.empty())
      GTEST_SKIP() << problem;
    const auto* info = ::testing::UnitTest::GetInstance()->current_test_info();
    dir = fs::path(::testing::TempDir()) / (std::string("lockstep_run_") + info->name());
    fs::remove_all(dir);
    fs::create_directories(dir);
  }
  void TearDown() override {
    if (!dir.empty()) fs::remove_all(dir);
  }

  RunConfig pretrain_config(const std::string& name, const std::string& device) const {
    RunConfig c;
    c.device = device;
    c.pretrain.mixture = {{"reverse", 1.0}};
    c.pretrain.max_num_steps = 6;
    c.pretrain.sequence_length = 40;
    c.pretrain.batch_size = 32;
    c.pretrain.micro_batch_size = 16;
    c.pretrain.max_val_samples = 24;
    c.pretrain.model.vocab_size = 272;
    c.data.train.length_max = 4;
    c.policy.optimizer.lr = 3e-3;
    c.checkpointing.save_period = 2;
    c.logger.log_dir = (dir / name).string();
    return c;
  }

  RunConfig rl_config(const std::string& name, const std::string& device, const fs::path& model,
                      std::int64_t steps) const {
    RunConfig c;
    c.device = device;
    c.policy.model_name = model.string();
    c.policy.train_micro_batch_size = 32;
    c.policy.max_total_sequence_length = 48;
    c.policy.generation.max_new_tokens = 8;
    c.policy.generation.max_num_seqs = 32;
    c.policy.generation.block_size = 4;
    c.policy.generation.num_blocks = 60;
    c.policy.optimizer.lr = 6e-4;
    c.grpo.num_prompts_per_step = 8;
    c.grpo.num_generations_per_prompt = 8;
    c.grpo.max_num_steps = steps;
    c.grpo.val_period = 0;
    c.data.train.task = "reverse";
    c.data.train.length_max = 4;
    c.checkpointing.save_period = 2;
    c.logger.log_dir = (dir / name).string();
    return c;
  }

  // A model with random weights.
  fs::path small_model() const {
    const fs::path folder = dir / "model";
    model::ModelConfig m;
    m.vocab_size = 272;
    m.hidden_size = 128;
    m.num_layers = 2;
    m.num_heads = 4;
    m.num_kv_heads = 2;
    m.head_dim = 32;
    m.max_positions = 256;
    m.qk_norm = true;
    m.num_experts = 8;
    m.router.top_k = 2;
    m.moe_intermediate_size = 128;
    const model::Tokenizer tokenizer = model::byte_tokenizer();
    m.bos_token_id = tokenizer.bos_id;
    m.eos_token_ids = {tokenizer.eos_id};
    m.pad_token_id = tokenizer.pad_id;
    model::Weights weights = model::make_weights(m);
    model::initialize(weights, 1);
    model::save_checkpoint(weights, &tokenizer, folder);
    return folder;
  }

  std::vector<std::string> checksums(const std::string& name) const {
    std::vector<std::string> out;
    for (const MetricsRow& row : read_run(dir / name).rows)
      out.push_back(std::get<std::string>(row.values.at("sync/weight_checksum")));
    return out;
  }

  std::string log_of(const std::string& name) const {
    std::string text;
    for (const auto& entry : fs::directory_iterator(dir / name / "logs")) {
      std::ifstream in(entry.path());
      text.append(std::istreambuf_iterator<char>(in), {});
    }
    return text;
  }

  fs::path dir;
};

// "activations 0.01 of 0.01 GiB, scratch 0.03 of 0.03 GiB": that no peak is above its plan.
void expect_within_plan(const std::string& memory) {
  double used[2], planned[2];
  ASSERT_EQ(std::sscanf(memory.c_str(), "activations %lf of %lf GiB, scratch %lf of %lf", &used[0],
                        &planned[0], &used[1], &planned[1]),
            4)
      << memory;
  for (int i = 0; i < 2; ++i) {
    EXPECT_LE(used[i], planned[i]) << memory;
  }
}

TEST_F(RunGpu, PretrainingHasTheWeightsOfTheCpuAndKeepsToItsPlan) {
  const PretrainSummary gpu = run_pretrain(pretrain_config("gpu", "cuda"), {}),
                        cpu = run_pretrain(pretrain_config("cpu", "cpu"), {});
  EXPECT_EQ(checksums("gpu").size(), 6u);
  EXPECT_EQ(checksums("gpu"), checksums("cpu"));
  EXPECT_EQ(gpu.validation_loss, cpu.validation_loss);
  expect_within_plan(gpu.memory);
  EXPECT_TRUE(cpu.memory.empty()) << cpu.memory;
  EXPECT_NE(log_of("gpu").find("GiB planned: weights"), std::string::npos) << log_of("gpu");
  EXPECT_NE(log_of("gpu").find("peak memory against the plan"), std::string::npos);
}

TEST_F(RunGpu, LearningHasTheWeightsOfTheCpuAndKeepsToItsPlan) {
  const fs::path model = small_model();
  const RlSummary gpu = run_rl(rl_config("gpu", "cuda", model, 4), {}),
                  cpu = run_rl(rl_config("cpu", "cpu", model, 4), {});
  EXPECT_EQ(checksums("gpu").size(), 4u);
  EXPECT_EQ(checksums("gpu"), checksums("cpu"));
  EXPECT_EQ(gpu.logprobs_different, 0);
  EXPECT_GT(gpu.logprobs_compared, 0);
  EXPECT_EQ(gpu.memory.rfind("activations ", 0), 0u) << gpu.memory;
}

// A cache that does not fit is a message, and the next run in the same process is as good as any.
TEST_F(RunGpu, MemoryThatRunsOutIsAMessageAndTheNextRunIsFine) {
  const fs::path model = small_model();
  RunConfig too_many_pages = rl_config("pages", "cuda", model, 2);
  too_many_pages.policy.generation.block_size = 128;
  too_many_pages.policy.generation.num_blocks = 16000000;
  try {
    run_rl(too_many_pages, {});
    ADD_FAILURE() << "a terabyte was given";
  } catch (const base::SystemError& e) {
    EXPECT_NE(std::string(e.what()).find("out of GPU memory"), std::string::npos) << e.what();
  }
  EXPECT_FALSE(fs::exists(dir / "pages" / "checkpoints" / "step_2"));
  run_rl(rl_config("fine", "cuda", model, 2), {});
  run_rl(rl_config("cpu", "cpu", model, 2), {});
  EXPECT_EQ(checksums("fine"), checksums("cpu"));
}

TEST_F(RunGpu, ARunWhoseGpuFailsGoesOnFromItsLastCheckpoint) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // a process of its own
  constexpr std::int64_t kSteps = 40;
  const fs::path model = small_model();
  // A kernel beside the run's own traps once four steps are done.
  const auto die = [&] {
    std::thread saboteur([&] {
      const fs::path metrics = dir / "broken" / "metrics.jsonl";
      const auto steps = [&] {
        std::ifstream in(metrics);
        return std::count(std::istreambuf_iterator<char>(in), {}, '\n');
      };
      while (steps() < 4) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      tensor::Arena arena(tensor::Device::kCuda);
      tensor::test::launch_trap(tensor::cuda_context(arena));
    });
    saboteur.detach();
    try {
      run_rl(rl_config("broken", "cuda", model, kSteps), {});
    } catch (const base::SystemError& e) {
      std::fprintf(stderr, "%s\n", e.what());
      std::_Exit(3);
    }
    std::_Exit(0);
  };
  EXPECT_EXIT(die(), ::testing::ExitedWithCode(3), "state in this process is lost.*--resume auto");
  const std::size_t before = checksums("broken").size();
  EXPECT_GE(before, 4u);
  EXPECT_LT(before, static_cast<std::size_t>(kSteps)) << "the GPU failed too late";
  run_rl(rl_config("broken", "cuda", model, kSteps), parse_resume("auto"));
  run_rl(rl_config("whole", "cuda", model, kSteps), {});
  EXPECT_EQ(checksums("broken").size(), static_cast<std::size_t>(kSteps));
  EXPECT_EQ(checksums("broken"), checksums("whole"));
}

}  // namespace
}  // namespace lockstep::loop::test

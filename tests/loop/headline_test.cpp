#include "loop/headline.h"

#include <gtest/gtest.h>

namespace lockstep::loop {
namespace {

TEST(HeadlineTest, NamesModelTaskMachineAndFolder) {
  RunConfig config;
  config.device = "cpu";
  config.policy.model_name = "models/demo";
  config.data.train.task = "reverse";
  config.grpo.num_prompts_per_step = 32;
  config.grpo.max_num_steps = 80;
  config.logger.log_dir = "runs/demo";
  model::ModelConfig model;
  model.num_layers = 4, model.num_experts = 8, model.router.top_k = 2;
  tensor::Context ctx;
  ctx.threads = 2;
  EXPECT_EQ(rl_headlines(config, model, 961408, ctx),
            (std::vector<std::string>{
                "model    models/demo: 961 k parameters, 4 layers, 8 experts (2 a token), "
                "fp8 blockwise",
                "task     reverse, reward exact; grpo, 32 prompts x 8 samples, 80 steps",
                "machine  cpu: portable, 2 threads; numerics contract 1",
                "run      runs/demo: config.yaml has every key"}));
}

TEST(HeadlineTest, NamesTheRolloutsPrecisionWhereItDiffers) {
  RunConfig config;
  config.policy.precision = "bf16";
  const model::ModelConfig model;
  EXPECT_TRUE(model_headline(config, model, 12340000).ends_with("bf16"));
  EXPECT_NE(model_headline(config, model, 12340000).find("new: 12.34 M"), std::string::npos);
  config.policy.generation.precision = "fp8";
  EXPECT_TRUE(
      model_headline(config, model, 1).ends_with("bf16 against a rollout in fp8 blockwise"));
  config.policy.precision = "fp8";
  config.policy.generation.fp8_cfg.num_last_layers_in_bf16 = 1;
  EXPECT_TRUE(model_headline(config, model, 1)
                  .ends_with("fp8 blockwise against a rollout in fp8 blockwise (first 0 and last 1 "
                             "layers bf16)"));
}

TEST(HeadlineTest, SaysWhyDeviceAutoFoundNoGpu) {
  RunConfig config;
  tensor::Context ctx;
  ctx.threads = 1;
  EXPECT_EQ(machine_headline(config, ctx), "machine  cpu: portable, 1 thread (" +
                                               tensor::cuda_problem() + "); numerics contract 1");
}

TEST(HeadlineTest, NamesThePartsOfTheMemoryPlan) {
  policy::MemoryPlan plan;
  plan.weights = std::size_t{3} << 29;
  plan.optimizer = std::size_t{2} << 30;
  plan.activations = std::size_t{1} << 30;
  plan.workspace = std::size_t{1} << 28;
  const tensor::DeviceMemory memory{std::size_t{70} << 30, std::size_t{80} << 30};
  EXPECT_EQ(memory_headline(plan, std::size_t{4} << 30, memory),
            "memory   GiB planned: weights 1.50, optimizer 2.00, keys and values 4.00, activations "
            "1.00, scratch 0.25; 70.0 of 80.0 free");
  EXPECT_EQ(memory_headline(plan, 0, memory),
            "memory   GiB planned: weights 1.50, optimizer 2.00, activations 1.00, scratch 0.25; "
            "70.0 of 80.0 free");
  tensor::Arena workspace;
  policy::Policy policy;
  policy.ctx = tensor::cpu_context(workspace);
  workspace.take(tensor::DType::kE4m3, {1 << 27});
  policy.saved.take(tensor::DType::kE4m3, {1 << 29});
  EXPECT_EQ(peak_memory_text(plan, policy),
            "activations 0.50 of 1.00 GiB, scratch 0.12 of 0.25 GiB");
}

}  // namespace
}  // namespace lockstep::loop

#include "loop/headline.h"

#include <gtest/gtest.h>

namespace lockstep::loop {
namespace {

TEST(HeadlineTest, NamesModelTaskMachineAndFolder) {
  RunConfig config;
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

}  // namespace
}  // namespace lockstep::loop

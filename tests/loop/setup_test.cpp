#include "loop/setup.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace lockstep::loop {
namespace {

TEST(Setup, RewardShapingKeysActWithAndWithoutAPreset) {
  for (const char* name : {"dapo", "grpo"}) {
    SCOPED_TRACE(name);
    RunConfig c;
    c.grpo.adv_estimator.name = name;
    c.grpo.reward_shaping.enabled = true;
    c.policy.generation.max_new_tokens = 50;
    rl::RewardShaping s = estimator(c).advantages.reward_shaping;
    EXPECT_TRUE(s.enabled);
    EXPECT_EQ(s.overlong_buffer_length, 10);
    EXPECT_EQ(s.overlong_buffer_penalty, 1.0);
    EXPECT_EQ(s.max_response_length, 50);
    c.grpo.reward_shaping.max_response_length = 40;
    EXPECT_EQ(estimator(c).advantages.reward_shaping.overlong_buffer_length, 8);
    c.grpo.reward_shaping.overlong_buffer_length = 7;
    c.grpo.reward_shaping.overlong_buffer_penalty = 0.25;
    s = estimator(c).advantages.reward_shaping;
    EXPECT_EQ(s.overlong_buffer_length, 7);
    EXPECT_EQ(s.overlong_buffer_penalty, 0.25);
    EXPECT_EQ(s.max_response_length, 40);
    c.grpo.reward_shaping.overlong_buffer_length = 41;
    EXPECT_THROW(estimator(c), base::InputError);
  }
  RunConfig c;
  c.grpo.adv_estimator.name = "dapo";
  EXPECT_TRUE(estimator(c).advantages.reward_shaping.enabled);
  c.grpo.reward_shaping.enabled = false;
  EXPECT_FALSE(estimator(c).advantages.reward_shaping.enabled);
}

TEST(Setup, StopTokensComeBesidesTheModelsOwn) {
  model::ModelConfig model;
  model.vocab_size = 20;
  model.eos_token_ids = {3, 4};
  RunConfig c;
  EXPECT_EQ(sampling_params(c, model).stop_token_ids, (std::vector<std::int32_t>{3, 4}));
  c.policy.generation.stop_token_ids = {9, 4};
  EXPECT_EQ(sampling_params(c, model).stop_token_ids, (std::vector<std::int32_t>{9, 4, 3}));
}

}  // namespace
}  // namespace lockstep::loop

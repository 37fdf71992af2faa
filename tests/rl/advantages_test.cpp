#include "rl/advantages.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"
#include "golden.h"
#include "rl/presets.h"
#include "rl/train_batch.h"

namespace lockstep::rl {
namespace {

data::Trajectory trajectory(std::int64_t prompt, double reward, int length = 2,
                            data::FinishReason finish = data::FinishReason::kStop) {
  data::Trajectory t;
  t.prompt_id = prompt;
  t.reward = reward;
  t.finish = finish;
  t.prompt = {5, 6, 7};
  for (int i = 0; i < length; ++i) {
    t.response.push_back(10 + i);
    t.logprobs.push_back(-0.5f - static_cast<float>(i));
  }
  return t;
}

TEST(Advantages, GoldenValues) {
  const auto file = golden();
  ASSERT_GE(file["advantages"].size(), 20u);
  for (const auto& row : file["advantages"]) {
    SCOPED_TRACE(row.dump());
    AdvantageConfig config;
    config.normalize_rewards = row["normalize_rewards"];
    config.use_leave_one_out_baseline = row["use_leave_one_out_baseline"];
    const auto rewards = row["rewards"].get<std::vector<double>>();
    const auto expected = row["advantages"].get<std::vector<double>>();
    const GroupAdvantages got = group_advantages(config, rewards);
    ASSERT_EQ(got.advantages.size(), expected.size());
    for (std::size_t i = 0; i < expected.size(); ++i)
      EXPECT_LE(std::fabs(got.advantages[i] - expected[i]), 1e-13 * (1 + std::fabs(expected[i])));
  }
}

// 0.1 has no exact mean in binary: equal rewards must not turn rounding into advantages.
TEST(Advantages, EqualRewardsAndGroupsOfOneAreExactlyZero) {
  for (const bool leave_one_out : {false, true}) {
    AdvantageConfig config;
    config.use_leave_one_out_baseline = leave_one_out;
    for (const double a : group_advantages(config, std::vector<double>(7, 0.1)).advantages)
      EXPECT_EQ(a, 0);
    EXPECT_EQ(group_advantages(config, std::vector<double>{3.5}).advantages[0], 0);
    EXPECT_TRUE(group_advantages(config, {}).advantages.empty());
  }
}

TEST(Advantages, GroupsByPromptInAnyOrder) {
  const std::vector<data::Trajectory> batch = {trajectory(4, 1), trajectory(9, 5), trajectory(4, 0),
                                               trajectory(9, 5)};
  const Advantages got = compute_advantages({}, batch);
  const double std = std::sqrt(0.5);
  EXPECT_EQ(got.groups, 2);
  EXPECT_EQ(got.groups_dropped, 0);
  EXPECT_DOUBLE_EQ(got.advantage[0], 0.5 / (std + 1e-6));
  EXPECT_DOUBLE_EQ(got.advantage[2], -0.5 / (std + 1e-6));
  EXPECT_EQ(got.advantage[1], 0);
  EXPECT_EQ(got.sample_mask, std::vector<float>(4, 1.0f));
}

TEST(Advantages, DynamicSamplingDropsEqualGroups) {
  AdvantageConfig config;
  config.use_dynamic_sampling = true;
  std::vector<data::Trajectory> batch = {trajectory(1, 1), trajectory(1, 1), trajectory(2, 1),
                                         trajectory(2, 0), trajectory(3, 0)};
  const Advantages got = compute_advantages(config, batch);
  EXPECT_EQ(got.sample_mask, (std::vector<float>{0, 0, 1, 1, 0}));
  EXPECT_EQ(got.groups, 3);
  EXPECT_EQ(got.groups_dropped, 2);
}

// A group whose rewards differ by length punishment alone teaches length only: the filter looks at
// the unshaped rewards.
TEST(Advantages, DynamicSamplingLooksAtUnshapedRewards) {
  AdvantageConfig config = preset("dapo", 10).advantages;
  const Advantages got =
      compute_advantages(config, std::vector{trajectory(1, 1, 10), trajectory(1, 1, 2)});
  EXPECT_EQ(got.groups_dropped, 1);
  EXPECT_NE(got.advantage[0], 0);
}

TEST(Advantages, OverlongPunishmentIsLinearInTheBuffer) {
  const RewardShaping shaping{true, 4, 0.5, 20};
  EXPECT_EQ(shaped_reward(shaping, 1, 3), 1);
  EXPECT_EQ(shaped_reward(shaping, 1, 16), 1);
  EXPECT_EQ(shaped_reward(shaping, 1, 17), 1 - 0.125);
  EXPECT_EQ(shaped_reward(shaping, 1, 20), 0.5);
  EXPECT_EQ(shaped_reward({}, 1, 1000), 1);
}

TEST(Advantages, OverlongFilteringMasksTruncatedButKeepsTheBaseline) {
  AdvantageConfig config;
  config.overlong_filtering = true;
  config.normalize_rewards = false;
  const Advantages got = compute_advantages(
      config, std::vector{trajectory(1, 1), trajectory(1, 0, 2, data::FinishReason::kLength)});
  EXPECT_EQ(got.sample_mask, (std::vector<float>{1, 0}));
  EXPECT_EQ(got.advantage[0], 0.5);
}

TEST(Advantages, NonFiniteRewardNamesThePrompt) {
  for (const double bad : {NAN, INFINITY, -INFINITY}) {
    try {
      compute_advantages({}, std::vector{trajectory(1, 0), trajectory(77, bad)});
      FAIL();
    } catch (const base::InputError& error) {
      EXPECT_NE(std::string(error.what()).find("prompt 77"), std::string::npos) << error.what();
    }
  }
}

TEST(Advantages, BadShapingIsRefused) {
  AdvantageConfig config;
  config.reward_shaping = {true, 0, 1, 10};
  EXPECT_THROW(validate(config), base::InputError);
  config.reward_shaping = {true, 11, 1, 10};
  EXPECT_THROW(validate(config), base::InputError);
  config.reward_shaping = {true, 5, NAN, 10};
  EXPECT_THROW(validate(config), base::InputError);
}

TEST(TrainBatch, LaysOutPromptAndResponse) {
  std::vector<data::Trajectory> batch = {trajectory(4, 1), trajectory(4, 0, 0)};
  const Advantages advantages = compute_advantages({}, batch);
  const data::TrainBatch got = make_train_batch(batch, advantages, true);
  const data::TrainSequence& s = got.sequences[0];
  EXPECT_EQ(s.tokens, (std::vector<std::int32_t>{5, 6, 7, 10, 11}));
  EXPECT_EQ(s.loss_mask, (std::vector<float>{0, 0, 0, 1, 1}));
  EXPECT_EQ(s.generation_logprobs, (std::vector<float>{0, 0, 0, -0.5f, -1.5f}));
  EXPECT_EQ(s.prev_logprobs, s.generation_logprobs);
  EXPECT_EQ(s.advantages[4], static_cast<float>(advantages.advantage[0]));
  EXPECT_EQ(s.group, 4);
  EXPECT_EQ(got.sequences[1].loss_mask, (std::vector<float>{0, 0, 0}));  // empty response
  EXPECT_TRUE(make_train_batch(batch, advantages, false).sequences[0].prev_logprobs.empty());
  batch[0].logprobs.pop_back();
  EXPECT_THROW(make_train_batch(batch, advantages, true), base::ContractError);
}

TEST(Presets, AreValidAndDiffer) {
  for (const char* name : {"grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo"}) {
    const Preset p = preset(name, 12);
    EXPECT_NO_THROW(validate(p.advantages)) << name;
    EXPECT_NO_THROW(validate(p.loss)) << name;
  }
  EXPECT_EQ(preset("dr_grpo", 12).loss.loss_agg_length, 12);
  EXPECT_FALSE(preset("dr_grpo", 12).advantages.normalize_rewards);
  EXPECT_TRUE(preset("rloo", 12).advantages.use_leave_one_out_baseline);
  EXPECT_EQ(preset("dapo", 3).advantages.reward_shaping.overlong_buffer_length, 1);
  EXPECT_EQ(preset("gspo", 12).loss.ratio_clip_max, 4e-4);
  EXPECT_THROW(preset("ppo", 12), base::InputError);
}

}  // namespace
}  // namespace lockstep::rl

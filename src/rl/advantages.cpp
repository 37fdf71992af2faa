#include "rl/advantages.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "base/error.h"

namespace lockstep::rl {
namespace {

constexpr double kStdEpsilon = 1e-6;

struct Moments {
  double mean = 0;
  double std = 0;
};

// Of all rewards except `skipped` (-1: of all). Equal rewards give exactly that mean and std 0.
Moments moments_without(std::span<const double> rewards, std::ptrdiff_t skipped) {
  double sum = 0, low = INFINITY, high = -INFINITY;
  std::int64_t count = 0;
  for (std::size_t i = 0; i < rewards.size(); ++i) {
    if (static_cast<std::ptrdiff_t>(i) == skipped) continue;
    sum += rewards[i];
    low = std::min(low, rewards[i]);
    high = std::max(high, rewards[i]);
    ++count;
  }
  if (count == 0) return {};
  if (low == high) return {low, 0};
  const double mean = sum / static_cast<double>(count);
  double square = 0;
  for (std::size_t i = 0; i < rewards.size(); ++i) {
    if (static_cast<std::ptrdiff_t>(i) != skipped)
      square += (rewards[i] - mean) * (rewards[i] - mean);
  }
  return {mean, std::sqrt(square / static_cast<double>(count - 1))};
}

}  // namespace

void validate(const AdvantageConfig& config) {
  const RewardShaping& shaping = config.reward_shaping;
  if (!shaping.enabled) return;
  if (shaping.max_response_length <= 0)
    base::fail<base::InputError>("grpo.reward_shaping.max_response_length is {}, must be positive",
                                 shaping.max_response_length);
  if (shaping.overlong_buffer_length <= 0 ||
      shaping.overlong_buffer_length > shaping.max_response_length)
    base::fail<base::InputError>(
        "grpo.reward_shaping.overlong_buffer_length is {}, must be in 1 .. max_response_length "
        "({})",
        shaping.overlong_buffer_length, shaping.max_response_length);
  if (!(shaping.overlong_buffer_penalty >= 0 && std::isfinite(shaping.overlong_buffer_penalty)))
    base::fail<base::InputError>(
        "grpo.reward_shaping.overlong_buffer_penalty is {}, must be finite and at least 0",
        shaping.overlong_buffer_penalty);
}

GroupAdvantages group_advantages(const AdvantageConfig& config, std::span<const double> rewards) {
  GroupAdvantages out;
  out.advantages.assign(rewards.size(), 0.0);
  const Moments all = moments_without(rewards, -1);
  out.mean = all.mean;
  out.std = all.std;
  if (rewards.size() < 2) return out;
  for (std::size_t i = 0; i < rewards.size(); ++i) {
    const Moments base = config.use_leave_one_out_baseline
                             ? moments_without(rewards, static_cast<std::ptrdiff_t>(i))
                             : all;
    out.advantages[i] = rewards[i] - base.mean;
    if (config.normalize_rewards && base.std > 0) out.advantages[i] /= base.std + kStdEpsilon;
  }
  return out;
}

double shaped_reward(const RewardShaping& shaping, double reward, std::int64_t response_length) {
  if (!shaping.enabled) return reward;
  const double buffer = shaping.overlong_buffer_length;
  const double exceeding =
      static_cast<double>(response_length) - shaping.max_response_length + buffer;
  return reward + std::min(0.0, -exceeding / buffer * shaping.overlong_buffer_penalty);
}

Advantages compute_advantages(const AdvantageConfig& config,
                              std::span<const data::Trajectory> trajectories) {
  validate(config);
  Advantages out;
  std::map<std::int64_t, std::vector<std::size_t>> groups;
  for (std::size_t i = 0; i < trajectories.size(); ++i) {
    const data::Trajectory& t = trajectories[i];
    if (!std::isfinite(t.reward))
      base::fail<base::InputError>(
          "the reward of prompt {}, sample {} is {}; a reward must be a finite number", t.prompt_id,
          t.sample, t.reward);
    groups[t.prompt_id].push_back(i);
    out.shaped_reward.push_back(shaped_reward(config.reward_shaping, t.reward,
                                              static_cast<std::int64_t>(t.response.size())));
    const bool truncated = t.finish != data::FinishReason::kStop;
    out.sample_mask.push_back(config.overlong_filtering && truncated ? 0.0f : 1.0f);
  }
  out.advantage.assign(trajectories.size(), 0.0);
  out.groups = static_cast<std::int64_t>(groups.size());
  for (const auto& [prompt_id, members] : groups) {
    std::vector<double> rewards;
    bool all_equal = true;
    for (const std::size_t i : members) {
      rewards.push_back(out.shaped_reward[i]);
      all_equal = all_equal && trajectories[i].reward == trajectories[members[0]].reward;
    }
    const GroupAdvantages group = group_advantages(config, rewards);
    const bool dropped = config.use_dynamic_sampling && all_equal;
    out.groups_dropped += dropped;
    for (std::size_t k = 0; k < members.size(); ++k) {
      out.advantage[members[k]] = group.advantages[k];
      if (dropped) out.sample_mask[members[k]] = 0;
    }
  }
  return out;
}

}  // namespace lockstep::rl

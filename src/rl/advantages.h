// Rewards -> advantages, one number a trajectory. Computed in double.
//
//   A_i = R_i - b_i                  b_i: mean of the group, or (leave-one-out) mean of the others
//   A_i = A_i / (std_i + 1e-6)       normalize_rewards, and only where std_i > 0
//
// std is the unbiased one (n - 1) over the same samples as the baseline; one sample has std 0. A
// group is all trajectories of one prompt_id. A group of one has advantage 0, and so has a group of
// equal rewards (exactly: equal rewards are compared, not subtracted).
//
//   estimator   normalize_rewards   use_leave_one_out_baseline   source
//   GRPO        yes                 no (optional)                arXiv 2402.03300
//   Dr. GRPO    no                  no                           arXiv 2503.20783
//   RLOO        no                  yes                          arXiv 2402.14740
//   DAPO        yes                 no, with dynamic sampling    arXiv 2503.14476
//
// The key names are NeMo-RL's `grpo.*`.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "data/trajectory.h"

namespace lockstep::rl {

// DAPO's soft overlong punishment (`grpo.reward_shaping`), with L = length of the response in
// tokens and L_soft = max_response_length - overlong_buffer_length:
//   R <- R + min(0, -(L - L_soft) / overlong_buffer_length * overlong_buffer_penalty)
struct RewardShaping {
  bool enabled = false;
  int overlong_buffer_length = 0;
  double overlong_buffer_penalty = 1;
  int max_response_length = 0;
};

struct AdvantageConfig {
  bool normalize_rewards = true;
  bool use_leave_one_out_baseline = false;
  bool use_dynamic_sampling = false;  // drop groups whose unshaped rewards are all equal
  bool overlong_filtering = false;    // truncated samples keep their place in the baseline, but
                                      // get sample_mask 0
  RewardShaping reward_shaping;
};

// Throws InputError naming the key.
void validate(const AdvantageConfig& config);

struct GroupAdvantages {
  std::vector<double> advantages;
  double mean = 0;
  double std = 0;  // unbiased, of all samples of the group
};

// `rewards` are those of one group, all finite.
GroupAdvantages group_advantages(const AdvantageConfig& config, std::span<const double> rewards);

double shaped_reward(const RewardShaping& shaping, double reward, std::int64_t response_length);

struct Advantages {
  std::vector<double> advantage;      // one a trajectory
  std::vector<double> shaped_reward;  // what the advantage was computed from
  std::vector<float> sample_mask;     // 0: dropped by dynamic sampling or by overlong filtering
  std::int64_t groups = 0;
  std::int64_t groups_dropped = 0;  // by dynamic sampling
};

// A trajectory counts as truncated unless it finished with kStop. A reward that is not finite is an
// InputError naming the prompt and the sample.
Advantages compute_advantages(const AdvantageConfig& config,
                              std::span<const data::Trajectory> trajectories);

}  // namespace lockstep::rl

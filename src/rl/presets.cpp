#include "rl/presets.h"

#include <algorithm>

#include "base/error.h"

namespace lockstep::rl {
namespace {

void divide_by_constant_length(LossConfig& loss, int max_response_length) {
  loss.loss_agg = LossAggregation::kSeqSumConst;
  loss.loss_agg_length = max_response_length;
}

}  // namespace

Preset preset(std::string_view name, int max_response_length) {
  LOCKSTEP_CHECK(max_response_length > 0, "max_response_length is {}", max_response_length);
  Preset p;
  if (name == "grpo") return p;
  if (name == "dr_grpo") {
    p.advantages.normalize_rewards = false;
    divide_by_constant_length(p.loss, max_response_length);
    return p;
  }
  if (name == "rloo") {
    p.advantages.normalize_rewards = false;
    p.advantages.use_leave_one_out_baseline = true;
    p.loss.disable_ppo_ratio = true;
    divide_by_constant_length(p.loss, max_response_length);
    return p;
  }
  if (name == "dapo") {
    p.advantages.use_dynamic_sampling = true;
    p.advantages.reward_shaping = {.enabled = true,
                                   .overlong_buffer_length = std::max(1, max_response_length / 5),
                                   .overlong_buffer_penalty = 1,
                                   .max_response_length = max_response_length};
    p.loss.ratio_clip_max = 0.28;
    return p;
  }
  if (name == "gspo") {
    p.loss.sequence_level_importance_ratios = true;
    p.loss.loss_agg = LossAggregation::kSeqMean;
    p.loss.ratio_clip_min = 3e-4;
    p.loss.ratio_clip_max = 4e-4;
    return p;
  }
  if (name == "cispo") {
    p.loss.use_cispo = true;
    p.loss.ratio_clip_min = 1;
    p.loss.ratio_clip_max = 0.28;
    return p;
  }
  base::fail<base::InputError>(
      "grpo.adv_estimator.name is '{}', must be grpo, dr_grpo, rloo, dapo, gspo or cispo", name);
}

}  // namespace lockstep::rl

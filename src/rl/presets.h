// What `grpo.adv_estimator.name` stands for: the defaults of every key that a config leaves out.
//
//   name      advantages                    loss                                        source
//   grpo      mean baseline, / std          clip 0.2 / 0.2, token-mean                  2402.03300
//   dr_grpo   mean baseline                 clip 0.2 / 0.2, seq-sum-const               2503.20783
//   rloo      leave-one-out baseline        no ratio (REINFORCE), seq-sum-const         2402.14740
//   dapo      as grpo, dynamic sampling,    clip 0.2 / 0.28, token-mean                 2503.14476
//             soft overlong punishment
//   gspo      as grpo                       sequence ratios, clip 3e-4 / 4e-4, seq-mean 2507.18071
//   cispo     as grpo                       clip 1 / 0.28 (no lower bound), token-mean  2506.13585
//
// No preset has a KL penalty: it costs a reference pass, and is asked for by
// loss_fn.reference_policy_kl_penalty. seq-sum-const divides by max_response_length. DAPO's buffer
// is a fifth of max_response_length (at least 1) with penalty 1, the paper's 4096 of 20480. The
// paper of CISPO gives no value for its upper bound; 0.28 is DAPO's.
#pragma once

#include <string_view>

#include "rl/advantages.h"
#include "rl/loss.h"

namespace lockstep::rl {

struct Preset {
  AdvantageConfig advantages;
  LossConfig loss;
};

// `max_response_length` is policy.generation.max_new_tokens. An unknown name is an InputError.
Preset preset(std::string_view adv_estimator_name, int max_response_length);

}  // namespace lockstep::rl

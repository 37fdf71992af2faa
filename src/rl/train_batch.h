// Trajectories + advantages -> the sequences that the policy trains on.
#pragma once

#include <span>

#include "data/trajectory.h"
#include "rl/advantages.h"

namespace lockstep::rl {

// One sequence a trajectory, in order: tokens = prompt then response; loss_mask 1, the advantage
// and the rollout's log-probability on response positions, 0 elsewhere; sample_mask and group from
// the advantages. `prev_is_generation` copies the rollout's log-probabilities into prev_logprobs,
// which is exact where policy and rollout give the same bits; otherwise prev_logprobs stays empty
// for the policy to fill. A trajectory without a response has an all-zero loss_mask.
data::TrainBatch make_train_batch(std::span<const data::Trajectory> trajectories,
                                  const Advantages& advantages, bool prev_is_generation);

}  // namespace lockstep::rl

#include "rl/train_batch.h"

#include "base/error.h"

namespace lockstep::rl {

data::TrainBatch make_train_batch(std::span<const data::Trajectory> trajectories,
                                  const Advantages& advantages, bool prev_is_generation) {
  LOCKSTEP_CHECK_EQ(trajectories.size(), advantages.advantage.size(), "make_train_batch");
  LOCKSTEP_CHECK_EQ(trajectories.size(), advantages.sample_mask.size(), "make_train_batch");
  data::TrainBatch batch;
  for (std::size_t i = 0; i < trajectories.size(); ++i) {
    const data::Trajectory& t = trajectories[i];
    LOCKSTEP_CHECK_EQ(t.logprobs.size(), t.response.size(), "one log-probability a response token");
    data::TrainSequence s;
    const std::size_t prompt = t.prompt.size(), total = prompt + t.response.size();
    s.tokens = t.prompt;
    s.tokens.insert(s.tokens.end(), t.response.begin(), t.response.end());
    s.loss_mask.assign(total, 0.0f);
    s.generation_logprobs.assign(total, 0.0f);
    s.advantages.assign(total, 0.0f);
    for (std::size_t k = prompt; k < total; ++k) {
      s.loss_mask[k] = 1;
      s.generation_logprobs[k] = t.logprobs[k - prompt];
      s.advantages[k] = static_cast<float>(advantages.advantage[i]);
    }
    if (prev_is_generation) s.prev_logprobs = s.generation_logprobs;
    s.sample_mask = advantages.sample_mask[i];
    s.group = t.prompt_id;
    batch.sequences.push_back(std::move(s));
  }
  return batch;
}

}  // namespace lockstep::rl

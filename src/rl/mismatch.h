// How far the trainer's log-probabilities are from the rollout's.
//
// With g = rollout and p = trainer log-probability of the same token, means over valid tokens
// (loss_mask and sample_mask not 0, token 0 left out) unless said otherwise:
//
//   token_mult_prob_error      mean exp(|g - p|)
//   gen_kl_error               mean exp(p - g) - (p - g) - 1
//   policy_kl_error            mean exp(g - p) - (g - p) - 1
//   js_divergence_error        mean of half k3(p, m) + half k3(g, m), with m = log(e^p/2 + e^g/2)
//   and
//                              k3(x, m) = exp(x - m) - (x - m) - 1
//   sampling_importance_ratio  mean exp(p - g)
//   approx_entropy             -mean exp(p - g) p
//   is_oob_ratio               share of tokens with exp(p - g) outside [ratio_min, ratio_max]
//   rollout_probs_diff_{max,mean,std}  of |e^p - e^g|; std unbiased
//   train_rollout_logprob_abs_diff     mean over sequences of the sequence's mean |p - g|
//   seq_mult_prob_error_{max,mean}     over sequences, of the sequence's mean exp(|g - p|)
//   logprobs_compared, logprobs_different   counts; the comparison is of the floats' bits
//   logprobs_nonfinite         tokens where p or g is not finite: compared bit by bit, left out of
//                              every mean
//
// Equal bits everywhere give exactly 1 for token_mult_prob_error, sampling_importance_ratio and
// seq_mult_prob_error_*, and exactly 0 for the errors: the divisor is the plain count. Differences
// enter exp clamped to +-600, so that every metric is finite. Without a token to compare all means
// are 0 (an impossible token_mult_prob_error, on purpose). Sums are in double: inside a sequence by
// position, then sequence by sequence, so the result does not depend on how micro-batches were cut.
//
// Definitions: NeMo-RL's metrics, verl's rollout_probs_diff, slime's
// train_rollout_logprob_abs_diff.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "data/trajectory.h"

namespace lockstep::rl {

// Bins of |p - g|: exactly 0, (0, 1e-8), [1e-8, 1e-7) ... [0.1, 1), [1, inf]. Non-finite: the last.
constexpr std::array<const char*, 11> kDifferenceBins = {
    "0", "<1e-8", "<1e-7", "<1e-6", "<1e-5", "<1e-4", "<1e-3", "<1e-2", "<1e-1", "<1", ">=1"};

struct MismatchSums {
  std::int64_t logprobs_compared = 0;
  std::int64_t logprobs_different = 0;
  std::int64_t logprobs_nonfinite = 0;
  std::int64_t sequences = 0;  // with at least one finite token
  double mult_prob = 0, gen_kl = 0, policy_kl = 0, js = 0, importance = 0, entropy = 0;
  double out_of_bounds = 0;
  double probs_diff = 0, probs_diff_square = 0, probs_diff_max = 0;
  double sequence_abs_diff = 0, sequence_mult_prob = 0, sequence_mult_prob_max = 0;
  std::array<std::int64_t, kDifferenceBins.size()> histogram{};
};

struct ImportanceBounds {
  double ratio_min = 0;
  double ratio_max = 1.0 / 0.0;
};

// Adds one sequence. `trainer_logprobs` has the length of `tokens`; a sequence with sample_mask 0
// adds nothing. Returns the sequence's mean exp(|g - p|) (1 where no token counts), which a caller
// may hold against `seq_logprob_error_threshold` to drop the sequence.
double accumulate_mismatch(const data::TrainSequence& sequence,
                           std::span<const float> trainer_logprobs, const ImportanceBounds& bounds,
                           MismatchSums& sums);

// The metrics above under their names.
std::map<std::string, double> mismatch_metrics(const MismatchSums& sums);

// The first token whose bits differ, for a message: sequence index and position, or {-1, -1}.
struct FirstDifference {
  std::int64_t sequence = -1;
  std::int64_t position = -1;
  float rollout = 0;
  float trainer = 0;
};
FirstDifference first_difference(std::span<const data::TrainSequence> sequences,
                                 std::span<const std::vector<float>> trainer_logprobs);

}  // namespace lockstep::rl

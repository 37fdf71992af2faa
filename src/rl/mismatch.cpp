#include "rl/mismatch.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "base/error.h"

namespace lockstep::rl {
namespace {

constexpr double kMaxLogDifference = 600;  // exp(600) ~ 1e260: sums of it stay finite

// expm1 keeps the digits of x^2 / 2 for small x.
double k3(double x) { return std::expm1(x) - x; }

// log(e^p / 2 + e^g / 2); exactly p for p == g.
double log_mixture(double p, double g) {
  const double high = std::max(p, g);
  return high + std::log(0.5 * std::exp(p - high) + 0.5 * std::exp(g - high));
}

std::size_t bin_of(double difference) {
  if (difference == 0) return 0;
  std::size_t bin = 1;
  for (double edge = 1e-8; bin + 1 < kDifferenceBins.size(); edge *= 10, ++bin)
    if (difference < edge) return bin;
  return bin;
}

bool counts(const data::TrainSequence& s, std::size_t t) {
  return t > 0 && s.loss_mask[t] != 0 && s.sample_mask != 0;
}

bool same_bits(float a, float b) {
  return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

void check_shapes(const data::TrainSequence& s, std::size_t trainer_length) {
  LOCKSTEP_CHECK_EQ(trainer_length, s.tokens.size(), "trainer log-probabilities");
  LOCKSTEP_CHECK_EQ(s.generation_logprobs.size(), s.tokens.size(), "generation_logprobs");
  LOCKSTEP_CHECK_EQ(s.loss_mask.size(), s.tokens.size(), "loss_mask");
}

}  // namespace

double accumulate_mismatch(const data::TrainSequence& s, std::span<const float> trainer_logprobs,
                           const ImportanceBounds& bounds, MismatchSums& sums) {
  check_shapes(s, trainer_logprobs.size());
  MismatchSums own;  // of this sequence
  std::int64_t finite = 0;
  double abs_diff = 0;
  for (std::size_t t = 0; t < s.tokens.size(); ++t) {
    if (!counts(s, t)) continue;
    const float g_bits = s.generation_logprobs[t], p_bits = trainer_logprobs[t];
    ++sums.logprobs_compared;
    sums.logprobs_different += !same_bits(g_bits, p_bits);
    const double g = g_bits, p = p_bits;
    if (!std::isfinite(g) || !std::isfinite(p)) {
      ++sums.logprobs_nonfinite;
      ++sums.histogram.back();
      continue;
    }
    ++finite;
    const double x = std::clamp(p - g, -kMaxLogDifference, kMaxLogDifference);
    const double ratio = std::exp(x);
    own.mult_prob += std::exp(std::fabs(x));
    own.gen_kl += k3(x);
    own.policy_kl += k3(-x);
    const double m = log_mixture(p, g);
    own.js += 0.5 * k3(p - m) + 0.5 * k3(g - m);
    own.importance += ratio;
    own.entropy -= ratio * p;
    own.out_of_bounds += ratio < bounds.ratio_min || ratio > bounds.ratio_max;
    const double probs_diff = std::fabs(std::exp(p) - std::exp(g));
    own.probs_diff += probs_diff;
    own.probs_diff_square += probs_diff * probs_diff;
    own.probs_diff_max = std::max(own.probs_diff_max, probs_diff);
    abs_diff += std::fabs(p - g);
    ++sums.histogram[bin_of(std::fabs(p - g))];
  }
  if (finite == 0) return 1;
  sums.mult_prob += own.mult_prob;
  sums.gen_kl += own.gen_kl;
  sums.policy_kl += own.policy_kl;
  sums.js += own.js;
  sums.importance += own.importance;
  sums.entropy += own.entropy;
  sums.out_of_bounds += own.out_of_bounds;
  sums.probs_diff += own.probs_diff;
  sums.probs_diff_square += own.probs_diff_square;
  sums.probs_diff_max = std::max(sums.probs_diff_max, own.probs_diff_max);
  const double n = static_cast<double>(finite), sequence_mult_prob = own.mult_prob / n;
  ++sums.sequences;
  sums.sequence_abs_diff += abs_diff / n;
  sums.sequence_mult_prob += sequence_mult_prob;
  sums.sequence_mult_prob_max = std::max(sums.sequence_mult_prob_max, sequence_mult_prob);
  return sequence_mult_prob;
}

std::map<std::string, double> mismatch_metrics(const MismatchSums& sums) {
  const double n =
      std::max<double>(1, static_cast<double>(sums.logprobs_compared - sums.logprobs_nonfinite));
  const double sequences = std::max<double>(1, static_cast<double>(sums.sequences));
  const double probs_mean = sums.probs_diff / n;
  const double probs_square = std::max(0.0, sums.probs_diff_square - n * probs_mean * probs_mean);
  return {
      {"token_mult_prob_error", sums.mult_prob / n},
      {"gen_kl_error", sums.gen_kl / n},
      {"policy_kl_error", sums.policy_kl / n},
      {"js_divergence_error", sums.js / n},
      {"sampling_importance_ratio", sums.importance / n},
      {"approx_entropy", sums.entropy / n},
      {"is_oob_ratio", sums.out_of_bounds / n},
      {"rollout_probs_diff_max", sums.probs_diff_max},
      {"rollout_probs_diff_mean", probs_mean},
      {"rollout_probs_diff_std", n > 1 ? std::sqrt(probs_square / (n - 1)) : 0.0},
      {"train_rollout_logprob_abs_diff", sums.sequence_abs_diff / sequences},
      {"seq_mult_prob_error_mean", sums.sequence_mult_prob / sequences},
      {"seq_mult_prob_error_max", sums.sequence_mult_prob_max},
      {"logprobs_compared", static_cast<double>(sums.logprobs_compared)},
      {"logprobs_different", static_cast<double>(sums.logprobs_different)},
      {"logprobs_nonfinite", static_cast<double>(sums.logprobs_nonfinite)},
  };
}

FirstDifference first_difference(std::span<const data::TrainSequence> sequences,
                                 std::span<const std::vector<float>> trainer_logprobs) {
  LOCKSTEP_CHECK_EQ(sequences.size(), trainer_logprobs.size(), "first_difference");
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const data::TrainSequence& s = sequences[i];
    check_shapes(s, trainer_logprobs[i].size());
    for (std::size_t t = 0; t < s.tokens.size(); ++t) {
      const float g = s.generation_logprobs[t], p = trainer_logprobs[i][t];
      if (counts(s, t) && !same_bits(g, p))
        return {static_cast<std::int64_t>(i), static_cast<std::int64_t>(t), g, p};
    }
  }
  return {};
}

}  // namespace lockstep::rl

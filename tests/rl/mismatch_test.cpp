#include "rl/mismatch.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "base/error.h"
#include "golden.h"

namespace lockstep::rl {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

TEST(Mismatch, GoldenValues) {
  const auto file = golden();
  MismatchSums sums;
  for (const data::TrainSequence& s : golden_sequences(file))
    accumulate_mismatch(s, s.prev_logprobs, {0.9, 1.1}, sums);
  const auto got = mismatch_metrics(sums);
  ASSERT_EQ(got.size(), file["mismatch"].size());
  for (const auto& [name, value] : file["mismatch"].items())
    EXPECT_LE(std::fabs(got.at(name) - value.get<double>()), 1e-13 * (1 + value.get<double>()))
        << name;
  EXPECT_EQ(std::accumulate(sums.histogram.begin(), sums.histogram.end(), std::int64_t{0}),
            sums.logprobs_compared);
}

TEST(Mismatch, EqualBitsAreExactlyPerfect) {
  const auto file = golden();
  MismatchSums sums;
  auto sequences = golden_sequences(file);
  for (auto& s : sequences) {
    EXPECT_EQ(accumulate_mismatch(s, s.generation_logprobs, {0.9, 1.1}, sums), 1.0);
  }
  const auto got = mismatch_metrics(sums);
  for (const char* one : {"token_mult_prob_error", "sampling_importance_ratio",
                          "seq_mult_prob_error_mean", "seq_mult_prob_error_max"})
    EXPECT_EQ(got.at(one), 1.0) << one;
  for (const char* zero :
       {"gen_kl_error", "policy_kl_error", "js_divergence_error", "is_oob_ratio",
        "rollout_probs_diff_max", "rollout_probs_diff_mean", "rollout_probs_diff_std",
        "train_rollout_logprob_abs_diff", "logprobs_different", "logprobs_nonfinite"})
    EXPECT_EQ(got.at(zero), 0.0) << zero;
  EXPECT_EQ(got.at("logprobs_compared"), 12);
  EXPECT_EQ(sums.histogram[0], 12);
}

TEST(Mismatch, OneUlpIsSeen) {
  const auto file = golden();
  auto sequences = golden_sequences(file);
  std::vector<std::vector<float>> trainer;
  for (const auto& s : sequences) trainer.push_back(s.generation_logprobs);
  EXPECT_EQ(first_difference(sequences, trainer).sequence, -1);
  float& changed = trainer[2][5];
  changed = std::nextafter(changed, 0.0f);
  trainer[4][3] = -77;  // sample_mask 0: not compared
  trainer[0][0] = -77;  // token 0: not compared
  MismatchSums sums;
  for (std::size_t i = 0; i < sequences.size(); ++i)
    accumulate_mismatch(sequences[i], trainer[i], {}, sums);
  EXPECT_EQ(sums.logprobs_different, 1);
  EXPECT_GT(mismatch_metrics(sums).at("token_mult_prob_error"), 1.0);
  EXPECT_GT(mismatch_metrics(sums).at("gen_kl_error"), 0.0);
  const FirstDifference first = first_difference(sequences, trainer);
  EXPECT_EQ(first.sequence, 2);
  EXPECT_EQ(first.position, 5);
  EXPECT_EQ(first.trainer, changed);
}

data::TrainSequence two_tokens(float g1, float g2) {
  data::TrainSequence s;
  s.tokens = {1, 2, 3};
  s.loss_mask = {0, 1, 1};
  s.generation_logprobs = {0, g1, g2};
  return s;
}

TEST(Mismatch, SignOfZeroIsADifferenceOfBits) {
  MismatchSums sums;
  accumulate_mismatch(two_tokens(0.0f, -1), std::vector<float>{0, -0.0f, -1}, {}, sums);
  EXPECT_EQ(sums.logprobs_different, 1);
  EXPECT_EQ(mismatch_metrics(sums).at("token_mult_prob_error"), 1.0);
}

TEST(Mismatch, ExtremeAndNonFiniteValuesKeepMetricsFinite) {
  for (const float far : {-200.0f, -3e38f, -kInf, kInf, std::nanf("")}) {
    MismatchSums sums;
    accumulate_mismatch(two_tokens(far, -1), std::vector<float>{0, -1, -1}, {}, sums);
    accumulate_mismatch(two_tokens(-1, -1), std::vector<float>{0, far, -1}, {}, sums);
    EXPECT_EQ(sums.logprobs_compared, 4);
    EXPECT_EQ(sums.logprobs_different, 2);
    EXPECT_EQ(sums.logprobs_nonfinite, std::isfinite(far) ? 0 : 2);
    EXPECT_EQ(sums.histogram.back(), 2);
    for (const auto& [name, value] : mismatch_metrics(sums))
      EXPECT_TRUE(std::isfinite(value)) << name;
  }
}

TEST(Mismatch, NothingToCompare) {
  MismatchSums sums;
  data::TrainSequence s = two_tokens(-1, -1);
  s.sample_mask = 0;
  EXPECT_EQ(accumulate_mismatch(s, std::vector<float>{0, -9, -9}, {}, sums), 1.0);
  for (const auto& [name, value] : mismatch_metrics(sums)) EXPECT_EQ(value, 0) << name;
  EXPECT_THROW(accumulate_mismatch(s, std::vector<float>{0}, {}, sums), base::ContractError);
}

TEST(Mismatch, HistogramBins) {
  MismatchSums sums;
  for (const float difference : {0.0f, 3e-7f, 0.03f, 0.5f, 8.0f})
    accumulate_mismatch(two_tokens(0, 0), std::vector<float>{0, difference, 0}, {}, sums);
  EXPECT_EQ(sums.histogram[0], 6);
  EXPECT_EQ(sums.histogram[3], 1);  // <1e-6
  EXPECT_EQ(sums.histogram[8], 1);  // <1e-1
  EXPECT_EQ(sums.histogram[9], 1);
  EXPECT_EQ(sums.histogram[10], 1);
}

}  // namespace
}  // namespace lockstep::rl

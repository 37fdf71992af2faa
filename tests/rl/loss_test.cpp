#include "rl/loss.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "base/error.h"
#include "golden.h"
#include "rl/presets.h"

namespace lockstep::rl {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// 64 additions and a few exponentials of values around 1: far below this.
double bound(double value) { return 1e-13 * (1 + std::fabs(value)); }

double loss_at(const LossConfig& config, const data::TrainSequence& s, std::vector<double> c,
               const LossDenominators& denominators) {
  std::vector<double> d(c.size(), NAN);
  LossSums sums;
  return sequence_loss(config, s, c, denominators, d, sums);
}

// The configurations whose loss, as a function of c, has stop-gradients only in constants of c.
bool differentiable(const LossConfig& config) {
  return !config.use_cispo && !config.force_on_policy_ratio;
}

TEST(Loss, GoldenValues) {
  const auto file = golden();
  const auto sequences = golden_sequences(file);
  const auto logprobs = golden_logprobs(file);
  const LossDenominators denominators = count_valid(sequences);
  EXPECT_EQ(denominators.valid_tokens, 12);
  EXPECT_EQ(denominators.valid_sequences, 4);
  ASSERT_GE(file["loss"].size(), 20u);
  for (const auto& [name, row] : file["loss"].items()) {
    SCOPED_TRACE(name);
    const LossConfig config = loss_config(row["config"]);
    const MicroBatchLoss got = micro_batch_loss(config, sequences, logprobs, denominators);
    const auto metrics = loss_metrics(config, got.sums, denominators);
    EXPECT_LE(std::fabs(got.loss - row["loss"].get<double>()), bound(row["loss"]));
    for (const char* key : {"kl_penalty", "is_oob_ratio", "probs_ratio"})
      EXPECT_LE(std::fabs(metrics.at(key) - row[key].get<double>()), bound(row[key])) << key;
  }
}

TEST(Loss, GradientsMatchCentralDifferences) {
  const auto file = golden();
  const auto sequences = golden_sequences(file);
  const auto logprobs = golden_logprobs(file);
  const LossDenominators denominators = count_valid(sequences);
  int nonzero = 0;
  for (const auto& [name, row] : file["loss"].items()) {
    const LossConfig config = loss_config(row["config"]);
    if (!differentiable(config)) continue;
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      SCOPED_TRACE(name + " sequence " + std::to_string(i));
      const std::vector<double> c(logprobs[i].begin(), logprobs[i].end());
      std::vector<double> d(c.size(), NAN);
      LossSums sums;
      sequence_loss(config, sequences[i], c, denominators, d, sums);
      for (std::size_t t = 0; t < c.size(); ++t) {
        // Central differences: error h^2 f''' / 6 + 2^-52 |f| / h, both below 1e-9 here.
        const double h = 1e-5;
        auto high = c, low = c;
        high[t] += h;
        low[t] -= h;
        const double expected = (loss_at(config, sequences[i], high, denominators) -
                                 loss_at(config, sequences[i], low, denominators)) /
                                (2 * h);
        EXPECT_LE(std::fabs(d[t] - expected), 1e-9) << "token " << t << " d " << d[t];
        nonzero += d[t] != 0;
      }
    }
  }
  EXPECT_GT(nonzero, 100);
}

// Stop-gradients: CISPO's clipped ratio, and the previous log-probability of the forced on-policy
// ratio, are constants of the differentiation.
TEST(Loss, GradientsThroughStopGradients) {
  const auto file = golden();
  auto sequences = golden_sequences(file);
  const auto logprobs = golden_logprobs(file);
  const LossDenominators denominators = count_valid(sequences);

  const LossConfig cispo = loss_config(file["loss"]["cispo"]["config"]);
  const MicroBatchLoss got = micro_batch_loss(cispo, sequences, logprobs, denominators);
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    for (std::size_t t = 1; t < logprobs[i].size(); ++t) {
      const data::TrainSequence& s = sequences[i];
      const double r = std::exp(double{logprobs[i][t]} - s.prev_logprobs[t]);
      const double expected = -double{s.advantages[t]} * std::min(r, 1.28) * s.loss_mask[t] *
                              s.sample_mask / (denominators.valid_tokens + 1e-8);
      EXPECT_LE(std::fabs(got.d_logprobs[i][t] - expected), 1e-7 * std::fabs(expected));
    }
  }

  LossConfig forced = loss_config(file["loss"]["on_policy_is"]["config"]);
  const MicroBatchLoss a = micro_batch_loss(forced, sequences, logprobs, denominators);
  for (std::size_t i = 0; i < sequences.size(); ++i) sequences[i].prev_logprobs = logprobs[i];
  forced.force_on_policy_ratio = false;
  const MicroBatchLoss b = micro_batch_loss(forced, sequences, logprobs, denominators);
  EXPECT_EQ(a.loss, b.loss);
  EXPECT_EQ(a.d_logprobs, b.d_logprobs);
  forced.force_on_policy_ratio = true;
  for (auto& s : sequences) s.prev_logprobs.clear();  // not read
  EXPECT_EQ(micro_batch_loss(forced, sequences, logprobs, denominators).d_logprobs, a.d_logprobs);
}

TEST(Loss, SequenceWeightIsTheProductNotTheGeometricMean) {
  data::TrainSequence s;
  s.tokens = {1, 2, 3};
  s.loss_mask = {0, 1, 1};
  s.generation_logprobs = {0, -1.5f, -2.25f};
  s.prev_logprobs = {0, -1.0f, -2.0f};
  s.advantages = {0, 1, 1};
  LossConfig config = preset("gspo", 8).loss;
  config.use_importance_sampling_correction = true;
  const double loss = loss_at(config, s, {0, -1.0, -2.0}, {2, 1});
  // Ratio 1 in both tokens; the weight is exp(0.5 + 0.25).
  EXPECT_LE(std::fabs(loss + std::exp(0.75)), 1e-7);
}

TEST(Loss, MicroBatchesAddUp) {
  const auto file = golden();
  const auto sequences = golden_sequences(file);
  const auto logprobs = golden_logprobs(file);
  const LossDenominators all = count_valid(sequences);
  for (const char* name : {"clipped", "gspo_wide", "seq_sum_const", "seq_mask_tis"}) {
    const LossConfig config = loss_config(file["loss"][name]["config"]);
    const MicroBatchLoss whole = micro_batch_loss(config, sequences, logprobs, all);
    double loss = 0;
    LossSums sums;
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      const MicroBatchLoss part = micro_batch_loss(config, std::span(sequences).subspan(i, 1),
                                                   std::span(logprobs).subspan(i, 1), all);
      loss += part.loss;
      sums += part.sums;
      EXPECT_EQ(part.d_logprobs[0], whole.d_logprobs[i]);
    }
    EXPECT_EQ(loss, whole.loss);
    EXPECT_EQ(loss_metrics(config, sums, all), loss_metrics(config, whole.sums, all));
  }
}

// Every golden configuration and every preset.
std::vector<LossConfig> all_configs() {
  std::vector<LossConfig> out;
  const auto file = golden();
  for (const auto& [name, row] : file["loss"].items()) out.push_back(loss_config(row["config"]));
  for (const char* name : {"grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo"})
    out.push_back(preset(name, 8).loss);
  EXPECT_GT(out.size(), 25u);
  return out;
}

void expect_finite(const std::vector<data::TrainSequence>& sequences,
                   const std::vector<std::vector<float>>& logprobs, bool expect_zero) {
  for (const LossConfig& config : all_configs()) {
    const LossDenominators denominators = count_valid(sequences);
    const MicroBatchLoss got = micro_batch_loss(config, sequences, logprobs, denominators);
    EXPECT_TRUE(std::isfinite(got.loss)) << got.loss;
    if (expect_zero) {
      EXPECT_EQ(got.loss, 0);
    }
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      ASSERT_EQ(got.d_logprobs[i].size(), sequences[i].tokens.size());
      for (const float d : got.d_logprobs[i]) {
        EXPECT_TRUE(std::isfinite(d)) << d;
        if (expect_zero) {
          EXPECT_EQ(d, 0);
        }
      }
    }
    for (const auto& [name, value] : loss_metrics(config, got.sums, denominators))
      EXPECT_TRUE(std::isfinite(value)) << name;
  }
}

data::TrainSequence plain_sequence(int length) {
  data::TrainSequence s;
  const std::size_t n = static_cast<std::size_t>(length);
  s.tokens.assign(n, 1);
  s.loss_mask.assign(n, 1);
  if (length > 0) s.loss_mask[0] = 0;
  s.generation_logprobs.assign(n, -1);
  s.prev_logprobs.assign(n, -1);
  s.reference_logprobs.assign(n, -1);
  s.advantages.assign(n, 0.5f);
  return s;
}

TEST(Loss, DegenerateBatchesGiveZero) {
  data::TrainSequence masked = plain_sequence(4), dropped = plain_sequence(4);
  masked.loss_mask.assign(4, 0);
  dropped.sample_mask = 0;
  expect_finite({}, {}, true);
  expect_finite({plain_sequence(0)}, {{}}, true);
  expect_finite({plain_sequence(1)}, {{-1}}, true);  // a prompt alone
  expect_finite({masked}, {{-1, -1, -1, -1}}, true);
  expect_finite({dropped}, {{kNan, kNan, kNan, kNan}}, true);
  expect_finite({masked, dropped}, {{-1, -2, -1, -1}, {-1, -1, -3, -1}}, true);
}

TEST(Loss, ZeroAdvantageHasNoPolicyGradient) {
  data::TrainSequence s = plain_sequence(4);
  s.advantages.assign(4, 0);
  const LossConfig config = preset("grpo", 8).loss;
  const MicroBatchLoss got = micro_batch_loss(
      config, std::span(&s, 1), std::vector<std::vector<float>>{{0, -1, -2, -3}}, {3, 1});
  EXPECT_EQ(got.loss, 0);
  for (const float d : got.d_logprobs[0]) EXPECT_EQ(d, 0);
}

TEST(Loss, ExtremeRatiosAreFinite) {
  for (const float advantage : {1.5f, -1.5f}) {
    for (const float far : {-200.0f, -3e38f, -kInf}) {
      data::TrainSequence old_far = plain_sequence(3), new_far = plain_sequence(3),
                          rollout_far = plain_sequence(3), reference_far = plain_sequence(3);
      old_far.prev_logprobs[1] = far;
      rollout_far.generation_logprobs[1] = far;
      reference_far.reference_logprobs[1] = far;
      for (auto* s : {&old_far, &new_far, &rollout_far, &reference_far})
        s->advantages.assign(3, advantage);
      expect_finite({old_far, new_far, rollout_far, reference_far},
                    {{0, -1, -1}, {0, far, -1}, {0, -1, -1}, {0, -1, -1}}, false);
    }
  }
}

// A token of -inf is out; the rest of its sequence is not.
TEST(Loss, MinusInfinityMasksOneToken) {
  for (const LossConfig& config : all_configs()) {
    data::TrainSequence s = plain_sequence(4), without = s;
    without.loss_mask[2] = 0;
    std::vector<std::vector<float>> c = {{0, -1.1f, -kInf, -0.9f}};
    const LossDenominators denominators = count_valid(std::span(&s, 1));
    const MicroBatchLoss a = micro_batch_loss(config, std::span(&s, 1), c, denominators);
    c[0][2] = -1;
    const MicroBatchLoss b = micro_batch_loss(config, std::span(&without, 1), c, denominators);
    EXPECT_EQ(a.loss, b.loss);
    EXPECT_EQ(a.d_logprobs, b.d_logprobs);
    EXPECT_EQ(a.sums.masked_infinite, 1);
  }
}

TEST(Loss, BadRolloutLogprobWeighsNothing) {
  LossConfig config;
  config.use_importance_sampling_correction = true;
  config.truncated_importance_sampling_type = ImportanceTruncation::kTis;
  config.truncated_importance_sampling_ratio = 2;
  config.truncated_importance_sampling_ratio_min = 0.5;
  data::TrainSequence s = plain_sequence(3);
  s.generation_logprobs[1] = kNan;
  s.generation_logprobs[2] = -200;  // exp(199) is no float
  std::vector<double> d(3, NAN);
  LossSums sums;
  EXPECT_EQ(sequence_loss(config, s, std::vector<double>{0, -1, -1}, {2, 1}, d, sums), 0);
  EXPECT_EQ(d, (std::vector<double>{0, 0, 0}));
}

// A broken forward pass must reach the finite-check.
TEST(Loss, NanOfTheForwardPassIsNotHidden) {
  for (const LossConfig& config : all_configs()) {
    for (const float bad : {kNan, kInf}) {
      const data::TrainSequence s = plain_sequence(3);
      const MicroBatchLoss got = micro_batch_loss(
          config, std::span(&s, 1), std::vector<std::vector<float>>{{0, bad, -1}}, {2, 1});
      EXPECT_TRUE(std::isnan(got.loss));
    }
  }
}

TEST(Loss, LengthsAreChecked) {
  data::TrainSequence s = plain_sequence(3);
  const std::vector<std::vector<float>> c = {{0, -1, -1}};
  s.prev_logprobs.clear();
  EXPECT_THROW(micro_batch_loss({}, std::span(&s, 1), c, {2, 1}), base::ContractError);
  LossConfig kl;
  kl.reference_policy_kl_penalty = 0.1;
  s = plain_sequence(3);
  s.reference_logprobs.clear();
  EXPECT_NO_THROW(micro_batch_loss({}, std::span(&s, 1), c, {2, 1}));
  EXPECT_THROW(micro_batch_loss(kl, std::span(&s, 1), c, {2, 1}), base::ContractError);
}

TEST(Loss, MeaninglessConfigsAreRefused) {
  const auto refused = [](auto change) {
    LossConfig config;
    change(config);
    EXPECT_THROW(validate(config), base::InputError);
  };
  EXPECT_NO_THROW(validate(LossConfig{}));
  refused([](LossConfig& c) { c.ratio_clip_min = -0.1; });
  refused([](LossConfig& c) { c.ratio_clip_max = kNan; });
  refused([](LossConfig& c) { c.ratio_clip_c = 1; });
  refused([](LossConfig& c) { c.sequence_level_importance_ratios = true; });
  refused([](LossConfig& c) { c.use_cispo = c.disable_ppo_ratio = true; });
  refused([](LossConfig& c) { c.loss_agg = LossAggregation::kSeqSumConst; });
  refused([](LossConfig& c) { c.truncated_importance_sampling_ratio = 2; });
  refused([](LossConfig& c) {
    c.truncated_importance_sampling_type = ImportanceTruncation::kTis;
    c.truncated_importance_sampling_ratio = 2;
  });
  refused([](LossConfig& c) {
    c.use_importance_sampling_correction = true;
    c.truncated_importance_sampling_type = ImportanceTruncation::kIcepop;
    c.truncated_importance_sampling_ratio = 2;
  });
  EXPECT_THROW(kl_type_from("k4"), base::InputError);
  EXPECT_THROW(loss_aggregation_from("mean"), base::InputError);
  EXPECT_THROW(importance_truncation_from(""), base::InputError);
}

}  // namespace
}  // namespace lockstep::rl

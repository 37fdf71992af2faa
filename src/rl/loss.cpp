#include "rl/loss.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"

namespace lockstep::rl {
namespace {

constexpr double kEpsilon = 1e-8;  // of every denominator
constexpr double kLogRatioClamp = 20;
constexpr double kFloatMax = std::numeric_limits<float>::max();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Term {
  double loss = 0;
  double d = 0;  // by the log-ratio x, or by c itself where the loss has no ratio
};

double importance_weight(double log_weight) {
  const double w = std::exp(log_weight);
  return w <= kFloatMax ? w : 0.0;  // false for NaN
}

// x is the unclamped log-ratio, c the current log-probability, a the advantage.
Term policy_gradient_term(const LossConfig& config, double a, double x, double c) {
  if (config.force_on_policy_ratio) return {-a + 0 * c, -a + 0 * c};
  if (config.disable_ppo_ratio) return {-a * c, -a + 0 * c};
  const double r = std::exp(std::clamp(x, -kLogRatioClamp, kLogRatioClamp));
  const double r_clipped = std::clamp(r, 1 - config.ratio_clip_min, 1 + config.ratio_clip_max);
  if (config.use_cispo) return {-a * r_clipped * c, -a * r_clipped};
  const double unclipped = -a * r, clipped = -a * r_clipped;
  const bool inside = !(std::fabs(x) > kLogRatioClamp);
  Term term = unclipped < clipped ? Term{clipped, 0} : Term{unclipped, inside ? unclipped : 0};
  if (config.ratio_clip_c > 0 && a < 0 && -a * config.ratio_clip_c < term.loss)
    term = {-a * config.ratio_clip_c, 0};
  return term;
}

// k(q - c) and its derivative by c.
Term kl_term(const LossConfig& config, double c, double q) {
  const double y = q - c;
  const double in = config.kl_input_clamp_value, out = config.kl_output_clamp_value;
  const double z = std::clamp(y, -in, in);
  Term term;
  switch (config.reference_policy_kl_type) {
    case KlType::kK1:
      term = {-z, 1};
      break;
    case KlType::kK2:
      term = {z * z / 2, -z};
      break;
    case KlType::kK3:
      term = {std::exp(z) - 1 - z, 1 - std::exp(z)};
      break;
  }
  if (std::fabs(y) > in || std::fabs(term.loss) > out) term.d = 0;
  term.loss = std::clamp(term.loss, -out, out);
  return term;
}

bool is_minus_inf(double value) { return value == -INFINITY; }

// The arrays of one sequence as the loss sees them; empty spans are not read.
struct View {
  std::span<const double> c;
  std::span<const float> p, g, q;
  std::vector<double> mask;  // loss_mask, less token 0 and the infinite ones
  double count = 0;          // sum of mask
  double log_weight(std::size_t t) const { return (p.empty() ? c[t] : double{p[t]}) - g[t]; }
};

void check_length(std::span<const float> array, std::size_t length, const char* name) {
  LOCKSTEP_CHECK(array.size() == length, "TrainSequence::{} has {} entries, tokens has {}", name,
                 array.size(), length);
}

View view_of(const LossConfig& config, const data::TrainSequence& s, std::span<const double> c,
             LossSums& sums) {
  const std::size_t length = s.tokens.size();
  LOCKSTEP_CHECK_EQ(c.size(), length, "sequence_loss: logprobs");
  check_length(s.loss_mask, length, "loss_mask");
  check_length(s.advantages, length, "advantages");
  View view;
  view.c = c;
  if (reads_prev_logprobs(config)) {
    check_length(s.prev_logprobs, length, "prev_logprobs");
    view.p = s.prev_logprobs;
  }
  if (config.use_importance_sampling_correction) {
    check_length(s.generation_logprobs, length, "generation_logprobs");
    view.g = s.generation_logprobs;
  }
  if (config.reference_policy_kl_penalty != 0) {
    check_length(s.reference_logprobs, length, "reference_logprobs");
    view.q = s.reference_logprobs;
  }
  view.mask.assign(length, 0.0);
  for (std::size_t t = 1; t < length; ++t) {
    if (s.loss_mask[t] == 0) continue;
    const bool infinite = is_minus_inf(c[t]) || (!view.p.empty() && is_minus_inf(view.p[t])) ||
                          (!view.g.empty() && is_minus_inf(view.g[t])) ||
                          (!view.q.empty() && is_minus_inf(view.q[t]));
    sums.masked_infinite += infinite;
    if (!infinite) view.mask[t] = s.loss_mask[t];
    view.count += view.mask[t];
  }
  return view;
}

// w of every token, 1 without a correction.
std::vector<double> importance_weights(const LossConfig& config, const View& view, double sample,
                                       LossSums& sums) {
  const std::size_t length = view.mask.size();
  std::vector<double> w(length, 1.0);
  if (!config.use_importance_sampling_correction) return w;
  double log_sum = 0, finite_sum = 0;
  for (std::size_t t = 0; t < length; ++t) {
    if (view.mask[t] == 0) continue;
    const double log_weight = view.log_weight(t);
    log_sum += view.mask[t] * log_weight;
    if (std::isfinite(log_weight)) finite_sum += view.mask[t] * log_weight;
    w[t] = importance_weight(log_weight);
  }
  if (config.sequence_level_importance_ratios)
    std::fill(w.begin(), w.end(), importance_weight(log_sum));
  const ImportanceTruncation type = config.truncated_importance_sampling_type;
  if (type == ImportanceTruncation::kOff) return w;
  const double high = config.truncated_importance_sampling_ratio.value();
  const double low = config.truncated_importance_sampling_ratio_min.value_or(0);
  if (type == ImportanceTruncation::kSeqMaskTis) {
    const double geometric_mean = std::exp(finite_sum / (view.count + kEpsilon));
    if (geometric_mean >= low && geometric_mean <= high) return w;
    sums.out_of_bounds += sample;
    std::fill(w.begin(), w.end(), 0.0);
    return w;
  }
  for (std::size_t t = 0; t < length; ++t) {
    if (view.mask[t] == 0) continue;
    const bool outside = w[t] < low || w[t] > high;
    sums.out_of_bounds += outside * view.mask[t] * sample;
    if (!outside) continue;
    if (type == ImportanceTruncation::kIcepop) {
      w[t] = 0;
    } else if (w[t] != 0) {
      w[t] = std::clamp(w[t], low, high);
    }
  }
  return w;
}

double token_share(const LossConfig& config, const LossDenominators& denominators, double count) {
  switch (config.loss_agg) {
    case LossAggregation::kTokenMean:
      return 1 / (denominators.valid_tokens + kEpsilon);
    case LossAggregation::kSeqMean:
      return 1 / (count + kEpsilon) / (denominators.valid_sequences + kEpsilon);
    case LossAggregation::kSeqSumConst:
      return 1 / config.loss_agg_length / (denominators.valid_sequences + kEpsilon);
  }
  return 0;
}

void add_ratio_metrics(const LossConfig& config, double x, double c, double weight,
                       LossSums& sums) {
  double ratio = config.force_on_policy_ratio ? 1
                 : config.disable_ppo_ratio
                     ? c
                     : std::exp(std::clamp(x, -kLogRatioClamp, kLogRatioClamp));
  if (!std::isfinite(ratio)) return;
  const bool unclipped = config.force_on_policy_ratio || config.disable_ppo_ratio;
  sums.probs_ratio += weight * ratio;
  sums.probs_ratio_clamped +=
      weight *
      (unclipped ? ratio : std::clamp(ratio, 1 - config.ratio_clip_min, 1 + config.ratio_clip_max));
  sums.probs_ratio_min = std::min(sums.probs_ratio_min, ratio);
  sums.probs_ratio_max = std::max(sums.probs_ratio_max, ratio);
}

void require(bool good, const char* key, const char* rule) {
  if (!good) base::fail<base::InputError>("loss_fn.{}: {}", key, rule);
}

}  // namespace

KlType kl_type_from(std::string_view text) {
  if (text == "k1") return KlType::kK1;
  if (text == "k2") return KlType::kK2;
  if (text == "k3") return KlType::kK3;
  base::fail<base::InputError>("loss_fn.reference_policy_kl_type is '{}', must be k1, k2 or k3",
                               text);
}

LossAggregation loss_aggregation_from(std::string_view text) {
  if (text == "token-mean") return LossAggregation::kTokenMean;
  if (text == "seq-mean") return LossAggregation::kSeqMean;
  if (text == "seq-sum-const") return LossAggregation::kSeqSumConst;
  base::fail<base::InputError>(
      "loss_fn.loss_agg is '{}', must be token-mean, seq-mean or seq-sum-const", text);
}

ImportanceTruncation importance_truncation_from(std::string_view text) {
  if (text == "off") return ImportanceTruncation::kOff;
  if (text == "tis") return ImportanceTruncation::kTis;
  if (text == "icepop") return ImportanceTruncation::kIcepop;
  if (text == "seq-mask-tis") return ImportanceTruncation::kSeqMaskTis;
  base::fail<base::InputError>(
      "loss_fn.truncated_importance_sampling_type is '{}', must be off, tis, icepop or "
      "seq-mask-tis",
      text);
}

void validate(const LossConfig& config) {
  require(config.ratio_clip_min >= 0 && config.ratio_clip_min <= 1, "ratio_clip_min",
          "must be in [0, 1]");
  require(config.ratio_clip_max >= 0 && std::isfinite(config.ratio_clip_max), "ratio_clip_max",
          "must be finite and at least 0");
  require(
      config.ratio_clip_c == 0 || (config.ratio_clip_c > 1 && std::isfinite(config.ratio_clip_c)),
      "ratio_clip_c", "must be greater than 1, or 0 for off");
  require(
      config.reference_policy_kl_penalty >= 0 && std::isfinite(config.reference_policy_kl_penalty),
      "reference_policy_kl_penalty", "must be finite and at least 0");
  require(config.kl_input_clamp_value > 0 && config.kl_input_clamp_value <= 80,
          "kl_input_clamp_value", "must be in (0, 80]");
  require(config.kl_output_clamp_value > 0, "kl_output_clamp_value", "must be positive");
  require(!(config.disable_ppo_ratio && config.force_on_policy_ratio), "disable_ppo_ratio",
          "excludes force_on_policy_ratio: both say what replaces the ratio");
  require(!(config.disable_ppo_ratio && config.ratio_clip_c != 0), "ratio_clip_c",
          "has no meaning with disable_ppo_ratio");
  const bool by_token = config.loss_agg == LossAggregation::kTokenMean;
  if (config.sequence_level_importance_ratios) {
    require(!by_token, "sequence_level_importance_ratios",
            "needs loss_agg seq-mean or seq-sum-const (token_level_loss: false)");
    require(!config.disable_ppo_ratio, "disable_ppo_ratio",
            "excludes sequence_level_importance_ratios");
  }
  if (config.use_cispo) {
    require(!config.sequence_level_importance_ratios, "use_cispo",
            "excludes sequence_level_importance_ratios: its weights are those of tokens");
    require(!config.disable_ppo_ratio && !config.force_on_policy_ratio, "use_cispo",
            "needs the ratio: excludes disable_ppo_ratio and force_on_policy_ratio");
    require(config.ratio_clip_c == 0, "use_cispo", "excludes ratio_clip_c");
    require(by_token, "use_cispo", "needs loss_agg token-mean (token_level_loss: true)");
  }
  require(config.loss_agg != LossAggregation::kSeqSumConst ||
              (config.loss_agg_length > 0 && std::isfinite(config.loss_agg_length)),
          "loss_agg_length", "must be positive with loss_agg seq-sum-const");
  const auto& high = config.truncated_importance_sampling_ratio;
  const auto& low = config.truncated_importance_sampling_ratio_min;
  const ImportanceTruncation type = config.truncated_importance_sampling_type;
  if (type == ImportanceTruncation::kOff) {
    require(!high && !low, "truncated_importance_sampling_ratio",
            "has no meaning without truncated_importance_sampling_type");
    return;
  }
  require(config.use_importance_sampling_correction, "truncated_importance_sampling_type",
          "needs use_importance_sampling_correction: true");
  require(high && *high > 0 && *high <= 1e6, "truncated_importance_sampling_ratio",
          "must be set, positive and at most 1e6");
  require(!low || (*low >= 0 && *low <= *high), "truncated_importance_sampling_ratio_min",
          "must be in [0, truncated_importance_sampling_ratio]");
  require(type == ImportanceTruncation::kTis || low, "truncated_importance_sampling_ratio_min",
          "must be set with icepop and seq-mask-tis");
  require(type != ImportanceTruncation::kSeqMaskTis || !config.sequence_level_importance_ratios,
          "truncated_importance_sampling_type",
          "seq-mask-tis excludes sequence_level_importance_ratios: it keeps token weights");
}

bool reads_prev_logprobs(const LossConfig& config) {
  if (config.force_on_policy_ratio) return false;
  return !config.disable_ppo_ratio || config.use_importance_sampling_correction;
}

LossDenominators count_valid(std::span<const data::TrainSequence> sequences) {
  LossDenominators out;
  for (const data::TrainSequence& s : sequences) {
    out.valid_sequences += s.sample_mask;
    for (std::size_t t = 1; t < s.loss_mask.size(); ++t)
      out.valid_tokens += double{s.loss_mask[t]} * s.sample_mask;
  }
  return out;
}

LossSums& operator+=(LossSums& sums, const LossSums& other) {
  sums.probs_ratio += other.probs_ratio;
  sums.probs_ratio_clamped += other.probs_ratio_clamped;
  sums.kl_penalty += other.kl_penalty;
  sums.approx_entropy += other.approx_entropy;
  sums.out_of_bounds += other.out_of_bounds;
  sums.clipped += other.clipped;
  sums.masked_infinite += other.masked_infinite;
  sums.probs_ratio_min = std::min(sums.probs_ratio_min, other.probs_ratio_min);
  sums.probs_ratio_max = std::max(sums.probs_ratio_max, other.probs_ratio_max);
  return sums;
}

double sequence_loss(const LossConfig& config, const data::TrainSequence& s,
                     std::span<const double> logprobs, const LossDenominators& denominators,
                     std::span<double> d_logprobs, LossSums& sums) {
  LOCKSTEP_CHECK_EQ(d_logprobs.size(), logprobs.size(), "sequence_loss");
  std::fill(d_logprobs.begin(), d_logprobs.end(), 0.0);
  if (s.sample_mask == 0) return 0;
  const View view = view_of(config, s, logprobs, sums);
  const std::vector<double> w = importance_weights(config, view, s.sample_mask, sums);
  const double share = token_share(config, denominators, view.count) * s.sample_mask;
  const bool by_sequence = config.sequence_level_importance_ratios && !config.force_on_policy_ratio;
  const bool has_ratio = !config.force_on_policy_ratio && !config.disable_ppo_ratio;
  const std::size_t length = s.tokens.size();

  double sequence_x = 0, sequence_d = 0;
  if (by_sequence) {
    for (std::size_t t = 0; t < length; ++t)
      if (view.mask[t] != 0)
        sequence_x += view.mask[t] * ((view.c[t] == INFINITY ? kNan : view.c[t]) - view.p[t]);
    sequence_x /= view.count + kEpsilon;
  }
  double loss = 0;
  for (std::size_t t = 0; t < length; ++t) {
    if (view.mask[t] == 0) continue;
    const double c = view.c[t] == INFINITY ? kNan : view.c[t];
    const double x = by_sequence ? sequence_x : has_ratio ? c - view.p[t] : 0.0;
    const double weight = view.mask[t] * share;
    const double a = s.advantages[t];
    const Term term = policy_gradient_term(config, a, x, c);
    loss += weight * w[t] * term.loss;
    (by_sequence ? sequence_d : d_logprobs[t]) += weight * w[t] * term.d;
    if (!view.q.empty()) {
      const Term kl = kl_term(config, c, view.q[t]);
      loss += weight * config.reference_policy_kl_penalty * kl.loss;
      d_logprobs[t] += weight * config.reference_policy_kl_penalty * kl.d;
      sums.kl_penalty += weight * kl.loss;
    }
    const double valid = view.mask[t] * s.sample_mask;
    sums.clipped += valid * (a != 0 && term.d == 0);
    add_ratio_metrics(config, x, c, valid, sums);
    if (!s.generation_logprobs.empty()) {
      const double entropy = -importance_weight(c - s.generation_logprobs[t]) * c;
      if (std::isfinite(entropy)) sums.approx_entropy += valid * entropy;
    }
  }
  if (by_sequence) {
    for (std::size_t t = 0; t < length; ++t)
      d_logprobs[t] += sequence_d * view.mask[t] / (view.count + kEpsilon);
  }
  return loss;
}

MicroBatchLoss micro_batch_loss(const LossConfig& config,
                                std::span<const data::TrainSequence> sequences,
                                std::span<const std::vector<float>> logprobs,
                                const LossDenominators& denominators) {
  validate(config);
  LOCKSTEP_CHECK_EQ(sequences.size(), logprobs.size(), "micro_batch_loss");
  MicroBatchLoss out;
  std::vector<double> c, d;
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    c.assign(logprobs[i].begin(), logprobs[i].end());
    d.assign(c.size(), 0.0);
    LossSums sums;
    out.loss += sequence_loss(config, sequences[i], c, denominators, d, sums);
    out.sums += sums;
    std::vector<float>& d_float = out.d_logprobs.emplace_back(d.size());
    for (std::size_t t = 0; t < d.size(); ++t)
      d_float[t] = static_cast<float>(std::clamp(d[t], -kFloatMax, kFloatMax));
  }
  return out;
}

std::map<std::string, double> loss_metrics(const LossConfig& config, const LossSums& sums,
                                           const LossDenominators& denominators) {
  const double tokens = denominators.valid_tokens + kEpsilon;
  const double sequences = denominators.valid_sequences + kEpsilon;
  const bool by_sequence =
      config.truncated_importance_sampling_type == ImportanceTruncation::kSeqMaskTis;
  const bool any = sums.probs_ratio_min <= sums.probs_ratio_max;
  return {
      {"probs_ratio", sums.probs_ratio / tokens},
      {"probs_ratio_clamped", sums.probs_ratio_clamped / tokens},
      {"probs_ratio_min", any ? sums.probs_ratio_min : 1.0},
      {"probs_ratio_max", any ? sums.probs_ratio_max : 1.0},
      {"kl_penalty", sums.kl_penalty},
      {"approx_entropy", sums.approx_entropy / tokens},
      {"is_oob_ratio", sums.out_of_bounds / (by_sequence ? sequences : tokens)},
      {"clip_fraction", sums.clipped / tokens},
      {"masked_infinite_toks", sums.masked_infinite},
      {"global_valid_toks", denominators.valid_tokens},
      {"global_valid_seqs", denominators.valid_sequences},
  };
}

}  // namespace lockstep::rl

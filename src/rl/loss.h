// The clipped policy-gradient losses, their gradients and their metrics. Host, double inside.
//
// For token t of a sequence, with c = current, p = previous, g = generation (rollout), q =
// reference log-probability, A = advantage, sg = stop-gradient:
//
//   log-ratio     x = c - p, clamped to +-20 (beyond it the gradient is 0); with
//                 sequence_level_importance_ratios x = sum_t m (c - p) / (n + 1e-8), one a
//                 sequence, and the gradient flows through it to every token (GSPO, arXiv
//                 2507.18071)
//   clipped       l = max(-A r, -A clamp(r, 1 - ratio_clip_min, 1 + ratio_clip_max)),  r = exp(x)
//   dual clip     ratio_clip_c = C > 1, A < 0:  l = min(l, -A C)               (arXiv 1912.09729)
//   CISPO         l = -A sg(clamp(r, 1 - ratio_clip_min, 1 + ratio_clip_max)) c (arXiv 2506.13585)
//   disable_ppo_ratio      l = -A c                                            (REINFORCE, RLOO)
//   force_on_policy_ratio  l = -A exp(c - sg(c)); p is c itself and prev_logprobs is not read
//
//   correction    w = exp(p - g) (token), exp(sum_t m (p - g)) (sequence_level_importance_ratios);
//                 NaN, or infinite as a float -> 0. w is a constant and multiplies l.
//     tis           w = clamp(w, ratio_min or 0, ratio); a zeroed NaN stays 0
//     icepop        w = 0 outside [ratio_min, ratio]
//     seq-mask-tis  w = 0 for a sequence whose exp(mean_t (p - g)) lies outside [ratio_min, ratio]
//                   (non-finite differences count as 0 in that mean)
//
//   KL penalty    y = clamp(q - c, +-kl_input_clamp_value);  k1: -y  k2: y^2 / 2  k3: e^y - 1 - y;
//                 clamped to +-kl_output_clamp_value, times reference_policy_kl_penalty, added to
//                 w l. Its gradient is 0 where a clamp acts.
//
//   token-mean      sum over tokens / (global valid tokens + 1e-8)             token_level_loss:
//   true seq-mean        sum over sequences of [sum over tokens / (n + 1e-8)]
//                   / (global valid sequences + 1e-8)                         token_level_loss:
//                   false
//   seq-sum-const   the same with a constant loss_agg_length in place of n + 1e-8  (Dr. GRPO)
//
// Masks: m = loss_mask (token 0 never counts), times sample_mask. A token is masked out, too, where
// c, p, g or q is -inf and the loss reads it (the token lies outside a filtered distribution); n
// counts what is left, the global denominators do not change. A NaN or +inf in c or p is a broken
// forward pass: the loss is NaN, so that a finite-check sees it. For all other inputs loss and
// gradients are finite (a gradient beyond the range of float is saturated).
//
// Semantics and names follow NeMo-RL's ClippedPGLossFn; the +-20 clamp of the log-ratio follows
// verl.
#pragma once

#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "data/trajectory.h"

namespace lockstep::rl {

enum class KlType { kK1, kK2, kK3 };
enum class LossAggregation { kTokenMean, kSeqMean, kSeqSumConst };
enum class ImportanceTruncation { kOff, kTis, kIcepop, kSeqMaskTis };

// Text of the config keys; an unknown word is an InputError naming the key and the choices.
KlType kl_type_from(std::string_view text);                              // k1 | k2 | k3
LossAggregation loss_aggregation_from(std::string_view text);            // see above
ImportanceTruncation importance_truncation_from(std::string_view text);  // off | tis | ...

struct LossConfig {  // `loss_fn.*`
  double ratio_clip_min = 0.2;
  double ratio_clip_max = 0.2;
  double ratio_clip_c = 0;  // 0 is off
  bool disable_ppo_ratio = false;
  bool force_on_policy_ratio = false;
  bool sequence_level_importance_ratios = false;
  bool use_cispo = false;
  LossAggregation loss_agg = LossAggregation::kTokenMean;
  double loss_agg_length = 0;  // seq-sum-const only
  double reference_policy_kl_penalty = 0;
  KlType reference_policy_kl_type = KlType::kK3;
  double kl_input_clamp_value = 20;
  double kl_output_clamp_value = 10;
  bool use_importance_sampling_correction = false;
  ImportanceTruncation truncated_importance_sampling_type = ImportanceTruncation::kOff;
  std::optional<double> truncated_importance_sampling_ratio;
  std::optional<double> truncated_importance_sampling_ratio_min;
};

// Ranges and combinations that have no meaning (CISPO with sequence ratios, token-mean with
// sequence ratios, a truncation without bounds ...): InputError naming the key.
void validate(const LossConfig& config);

// Which arrays of a TrainSequence the loss reads.
bool reads_prev_logprobs(const LossConfig& config);

struct LossDenominators {
  double valid_tokens = 0;     // sum of loss_mask * sample_mask, token 0 left out
  double valid_sequences = 0;  // sum of sample_mask
};
// Of a whole optimizer step: add the counts of all its micro-batches (and ranks).
LossDenominators count_valid(std::span<const data::TrainSequence> sequences);

// Sums over tokens, to be added over the micro-batches of a step.
struct LossSums {
  double probs_ratio = 0;
  double probs_ratio_clamped = 0;
  double kl_penalty = 0;  // weighted and divided like the loss, without the penalty's factor
  double approx_entropy = 0;
  double out_of_bounds = 0;  // tokens; sequences with seq-mask-tis
  double clipped = 0;        // tokens whose policy-gradient term has no gradient though A != 0
  double masked_infinite = 0;
  double probs_ratio_min = 1.0 / 0.0;
  double probs_ratio_max = -1.0 / 0.0;
};
LossSums& operator+=(LossSums& sums, const LossSums& other);

// The loss contribution of one sequence. `logprobs` and `d_logprobs` (overwritten) have the length
// of `tokens`.
double sequence_loss(const LossConfig& config, const data::TrainSequence& sequence,
                     std::span<const double> logprobs, const LossDenominators& denominators,
                     std::span<double> d_logprobs, LossSums& sums);

struct MicroBatchLoss {
  double loss = 0;                             // summed over the sequences in order
  std::vector<std::vector<float>> d_logprobs;  // d loss / d logprobs, shaped as `tokens`
  LossSums sums;
};
// `logprobs[s][t]` is the current log-probability of sequences[s].tokens[t].
MicroBatchLoss micro_batch_loss(const LossConfig& config,
                                std::span<const data::TrainSequence> sequences,
                                std::span<const std::vector<float>> logprobs,
                                const LossDenominators& denominators);

// The step's metrics under NeMo-RL's names (without `train/`): probs_ratio, probs_ratio_clamped,
// probs_ratio_min, probs_ratio_max (1 when no token counts), kl_penalty, approx_entropy
// (-mean exp(c - g) c), is_oob_ratio, and clip_fraction, masked_infinite_toks, global_valid_toks,
// global_valid_seqs. All finite.
std::map<std::string, double> loss_metrics(const LossConfig& config, const LossSums& sums,
                                           const LossDenominators& denominators);

}  // namespace lockstep::rl

// The frequencies of the rotary embedding, as they are or stretched to longer texts.
#pragma once

#include <vector>

#include "model/config.h"

namespace lockstep::model {

struct RopeFrequencies {
  std::vector<double> inverse;  // of the pair (i, i + K/2)
  double factor = 1;            // of cos and sin
};

// In double, f_i = theta^(-2i/K), s the scaling's factor, P its original positions:
//   none: f_i.   linear: f_i / s.
//   llama3, with turns t = P f_i / (2 pi): f_i / s where t < low_freq_factor, f_i where
//     t > high_freq_factor, between them (1 - u) f_i / s + u f_i, u = (t - low) / (high - low).
//   yarn (arXiv 2309.00071): u f_i / s + (1 - u) f_i with u = clamp((i - a) / (b - a), 0, 1), where
//     a and b are the i at which P positions make beta_fast and beta_slow turns,
//     K ln(P / (2 pi beta)) / (2 ln theta), with `truncate` rounded down and up, a at least 0, b at
//     most K - 1, and b = a + 0.001 where they are equal; cos and sin times attention_factor.
RopeFrequencies rope_frequencies(const ModelConfig& config);

// yarn's own attention factor: 0.1 ln(factor) + 1, and 1 for a factor of at most 1; `m` scales the
// logarithm.
double yarn_attention_factor(double factor, double m = 1);

// What query times key is scaled by: 1 / sqrt of their width. Latent attention scales by the square
// of yarn's factor for mscale_all_dim besides, where the rope scaling has one.
double attention_scale(const ModelConfig& config);

}  // namespace lockstep::model

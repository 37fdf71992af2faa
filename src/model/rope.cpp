#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace lockstep::model {

namespace {

constexpr double kTurn = 2 * std::numbers::pi;

double llama3(double f, const RopeScaling& s) {
  const double turns = static_cast<double>(s.original_positions) * f / kTurn;
  if (turns < s.low_freq_factor) return f / s.factor;
  if (turns > s.high_freq_factor) return f;
  const double u = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
  return (1 - u) * f / s.factor + u * f;
}

// Where yarn's ramp from the old frequencies to the stretched ones begins and ends, in pairs.
struct Ramp {
  double begin, end;
};

Ramp yarn_ramp(const ModelConfig& c) {
  const RopeScaling& s = c.rope_scaling;
  const auto K = static_cast<double>(c.head_dim);
  const auto pair = [&](double turns) {
    return K * std::log(static_cast<double>(s.original_positions) / (kTurn * turns)) /
           (2 * std::log(c.rope_theta));
  };
  Ramp r{pair(s.beta_fast), pair(s.beta_slow)};
  if (s.truncate) r = {std::floor(r.begin), std::ceil(r.end)};
  r = {std::max(r.begin, 0.0), std::min(r.end, K - 1)};
  if (r.begin == r.end) r.end += 0.001;
  return r;
}

}  // namespace

RopeFrequencies rope_frequencies(const ModelConfig& c) {
  const RopeScaling& s = c.rope_scaling;
  const bool yarn = s.kind == RopeScaling::kYarn;
  const Ramp ramp = yarn ? yarn_ramp(c) : Ramp{};
  RopeFrequencies out;
  if (yarn) out.factor = s.attention_factor;
  const auto K = static_cast<double>(c.head_dim);
  for (std::int64_t i = 0; i < c.head_dim / 2; ++i) {
    double f = std::pow(c.rope_theta, -2.0 * static_cast<double>(i) / K);
    if (s.kind == RopeScaling::kLinear) f /= s.factor;
    if (s.kind == RopeScaling::kLlama3) f = llama3(f, s);
    if (yarn) {
      const double u =
          std::clamp((static_cast<double>(i) - ramp.begin) / (ramp.end - ramp.begin), 0.0, 1.0);
      f = u * f / s.factor + (1 - u) * f;
    }
    out.inverse.push_back(f);
  }
  return out;
}

double yarn_attention_factor(double factor, double m) {
  return factor <= 1 ? 1.0 : 0.1 * m * std::log(factor) + 1.0;
}

double attention_scale(const ModelConfig& c) {
  if (!is_latent(c)) return 1.0 / std::sqrt(static_cast<double>(c.head_dim));
  const double scale = 1.0 / std::sqrt(static_cast<double>(c.latent.nope + c.head_dim));
  if (c.rope_scaling.kind != RopeScaling::kYarn || c.rope_scaling.mscale_all_dim == 0) return scale;
  const double m = yarn_attention_factor(c.rope_scaling.factor, c.rope_scaling.mscale_all_dim);
  return scale * m * m;
}

}  // namespace lockstep::model

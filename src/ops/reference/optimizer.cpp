#include "ops/reference/optimizer.h"

#include <cmath>

namespace lockstep::ops::reference {

void adamw_step(Adamw& state, const std::vector<double>& grad) {
  Adamw& s = state;
  ++s.step;
  const double bias1 = 1 - std::pow(s.beta1, s.step), bias2 = 1 - std::pow(s.beta2, s.step);
  for (std::size_t i = 0; i < grad.size(); ++i) {
    const double g = grad[i] * s.clip;
    s.m[i] = s.beta1 * s.m[i] + (1 - s.beta1) * g;
    s.v[i] = s.beta2 * s.v[i] + (1 - s.beta2) * g * g;
    const double update = s.m[i] / bias1 / (std::sqrt(s.v[i] / bias2) + s.eps);
    s.w[i] = (1 - s.lr * s.weight_decay) * s.w[i] - s.lr * update;
  }
}

double norm(const std::vector<double>& x) {
  double sum = 0;
  for (const double v : x) sum += v * v;
  return std::sqrt(sum);
}

}  // namespace lockstep::ops::reference

#include "ops/reference/swiglu.h"

#include <cmath>

namespace lockstep::ops::reference {

std::vector<double> swiglu(const std::vector<double>& gate_up, std::int64_t F) {
  std::vector<double> a(gate_up.size() / 2);
  const auto width = static_cast<std::size_t>(F);
  for (std::size_t i = 0; i < a.size(); ++i) {
    const std::size_t at = i / width * 2 * width + i % width;
    a[i] = gate_up[at] / (1 + std::exp(-gate_up[at])) * gate_up[at + width];
  }
  return a;
}

std::vector<double> swiglu_backward(const std::vector<double>& gate_up,
                                    const std::vector<double>& d_a, std::int64_t F) {
  std::vector<double> d(gate_up.size());
  const auto width = static_cast<std::size_t>(F);
  for (std::size_t i = 0; i < d_a.size(); ++i) {
    const std::size_t at = i / width * 2 * width + i % width;
    const double g = gate_up[at], decay = std::exp(-g), whole = 1 + decay;
    d[at + width] = d_a[i] * g / whole;
    d[at] = d_a[i] * gate_up[at + width] * (1 / whole + g * decay / (whole * whole));
  }
  return d;
}

}  // namespace lockstep::ops::reference

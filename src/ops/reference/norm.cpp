#include "ops/reference/norm.h"

#include <cmath>
#include <complex>

namespace lockstep::ops::reference {

Values rms_norm(const Values& x, const Values& w, double eps) {
  const std::size_t D = w.size();
  Values h(x.size());
  for (std::size_t t = 0; t < x.size(); t += D) {
    double squares = 0;
    for (std::size_t d = 0; d < D; ++d) squares += x[t + d] * x[t + d];
    const double root = std::sqrt(squares / static_cast<double>(D) + eps);
    for (std::size_t d = 0; d < D; ++d) h[t + d] = x[t + d] / root * w[d];
  }
  return h;
}

NormGradient rms_norm_backward(const Values& dh, const Values& x, const Values& w, double eps) {
  const std::size_t D = w.size();
  NormGradient out{Values(x.size()), Values(D)};
  for (std::size_t t = 0; t < x.size(); t += D) {
    double squares = 0, product = 0;
    for (std::size_t d = 0; d < D; ++d) {
      squares += x[t + d] * x[t + d];
      product += dh[t + d] * w[d] * x[t + d];
    }
    const double variance = squares / static_cast<double>(D) + eps;
    const double root = std::sqrt(variance);
    for (std::size_t d = 0; d < D; ++d) {
      const double along = product * x[t + d] / (static_cast<double>(D) * variance);
      out.dx[t + d] = (dh[t + d] * w[d] - along) / root;
      out.dw[d] += dh[t + d] * x[t + d] / root;
    }
  }
  return out;
}

namespace {

// Turns the pairs (i, i + K/2) of every head by position * theta^(-2i/K), or back.
void rotate(const HeadNormRope& op, double direction, Values& x) {
  if (op.theta == 0) return;
  const auto K = static_cast<std::size_t>(op.width);
  for (std::size_t h = 0; h * K < x.size(); ++h) {
    const auto p = static_cast<double>(op.positions[h / static_cast<std::size_t>(op.heads)]);
    for (std::size_t i = 0; i < K / 2; ++i) {
      const double exponent = -2 * static_cast<double>(i) / static_cast<double>(K);
      double& a = x[h * K + i];
      double& b = x[h * K + i + K / 2];
      const std::complex<double> turned =
          std::complex(a, b) * std::polar(1.0, direction * p * std::pow(op.theta, exponent));
      a = turned.real();
      b = turned.imag();
    }
  }
}

}  // namespace

Values head_norm_rope(const HeadNormRope& op, const Values& x) {
  Values y = op.w.empty() ? x : rms_norm(x, op.w, op.eps);
  rotate(op, 1, y);
  return y;
}

NormGradient head_norm_rope_backward(const HeadNormRope& op, const Values& d_out, const Values& x) {
  Values dy = d_out;
  rotate(op, -1, dy);
  if (op.w.empty()) return {dy, {}};
  return rms_norm_backward(dy, x, op.w, op.eps);
}

}  // namespace lockstep::ops::reference

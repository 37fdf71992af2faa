// Plain loops in double that the reference's parts share (model/reference.h).
#pragma once

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "model/reference.h"

namespace lockstep::model::reference {

using Matrix = ReferenceMatrix;

inline double dot(const double* a, const double* b, std::int64_t n) {
  double s[8] = {};
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8)
#pragma omp simd
    for (int j = 0; j < 8; ++j) s[j] += a[i + j] * b[i + j];
  for (; i < n; ++i) s[0] += a[i] * b[i];
  return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

inline void axpy(double a, const double* x, double* y, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

// y = W x
inline std::vector<double> multiply(const Matrix& w, const double* x) {
  std::vector<double> y(static_cast<std::size_t>(w.rows));
  for (std::int64_t n = 0; n < w.rows; ++n) y[n] = dot(w.row(n), x, w.columns);
  return y;
}

// From dy of y = W x: dx += W^T dy, dW += dy x^T.
inline void multiply_backward(const Matrix& w, const double* x, const double* dy, double* dx,
                              Matrix& dw) {
  for (std::int64_t n = 0; n < w.rows; ++n) {
    axpy(dy[n], w.row(n), dx, w.columns);
    axpy(dy[n], x, dw.row(n), w.columns);
  }
}

// Every row of x through W.
inline Matrix linear(const Matrix& w, const Matrix& x) {
  Matrix y(x.rows, w.rows);
  for (std::int64_t t = 0; t < x.rows; ++t) {
    const auto row = multiply(w, x.row(t));
    std::copy(row.begin(), row.end(), y.row(t));
  }
  return y;
}

inline void linear_backward(const Matrix& w, const Matrix& x, const Matrix& dy, Matrix& dx,
                            Matrix& dw) {
  for (std::int64_t t = 0; t < x.rows; ++t)
    multiply_backward(w, x.row(t), dy.row(t), dx.row(t), dw);
}

inline double inverse_rms(const double* x, std::int64_t n, double eps) {
  return 1.0 / std::sqrt(dot(x, x, n) / static_cast<double>(n) + eps);
}

// y_i = x_i r w_i with r = (mean x^2 + eps)^(-1/2)
inline void rms_norm(const double* x, const double* w, std::int64_t n, double eps, double* y) {
  const double r = inverse_rms(x, n, eps);
  for (std::int64_t i = 0; i < n; ++i) y[i] = x[i] * r * w[i];
}

// dx_j += r w_j dy_j - x_j r^3 / n * sum_i dy_i w_i x_i
inline void rms_norm_backward(const double* x, const double* w, std::int64_t n, double eps,
                              const double* dy, double* dx, double* dw) {
  const double r = inverse_rms(x, n, eps);
  double s = 0;
  for (std::int64_t i = 0; i < n; ++i) s += dy[i] * w[i] * x[i];
  for (std::int64_t i = 0; i < n; ++i) {
    dw[i] += dy[i] * x[i] * r;
    dx[i] += r * w[i] * dy[i] - x[i] * r * r * r * s / static_cast<double>(n);
  }
}

inline Matrix norm_rows(const Matrix& x, const Matrix& w, double eps) {
  Matrix y(x.rows, x.columns);
  for (std::int64_t t = 0; t < x.rows; ++t) rms_norm(x.row(t), w.row(0), x.columns, eps, y.row(t));
  return y;
}

inline void norm_rows_backward(const Matrix& x, const Matrix& w, double eps, const Matrix& dy,
                               Matrix& dx, Matrix& dw) {
  for (std::int64_t t = 0; t < x.rows; ++t)
    rms_norm_backward(x.row(t), w.row(0), x.columns, eps, dy.row(t), dx.row(t), dw.row(0));
}

// Names of one layer's parameters and the sizes that everything below needs.
struct Layer {
  const ReferenceModel& model;
  std::int64_t index;
  std::string prefix = fmt::format("model.layers.{}.", index);
  const ModelConfig& c = model.config;
  const ReferenceParams& params = model.params;

  std::string name(const std::string& what) const { return prefix + what + ".weight"; }
  std::string bias(const std::string& what) const { return prefix + what + ".bias"; }
  bool dense() const { return is_dense(c, index); }
  std::string router() const { return router_name(c, index); }
  std::string mlp(std::int64_t expert, Projection which) const {
    return mlp_name(c, index, expert, which);
  }
  const Matrix& at(const std::string& what) const { return params.at(name(what)); }
};

// Latent attention (reference_latent.cpp) of the layer whose h1 is there: fills s.attention.
void latent_attention(const Layer& l, ReferenceLayer& s);
// Adds to d_h1 and the gradients what d_attention gives.
void latent_attention_backward(const Layer& l, const ReferenceLayer& s, const Matrix& d_attention,
                               Matrix& d_h1, ReferenceParams& gradients);

}  // namespace lockstep::model::reference

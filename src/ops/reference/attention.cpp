#include "ops/reference/attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace lockstep::ops::reference {

namespace {

double dot(const double* a, const double* b, std::int64_t n) {
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// Probabilities of one query over the keys it sees; returns the natural log of the softmax's sum.
double probabilities(const AttentionShape& shape, const double* q, const double* k, std::int64_t t,
                     std::int64_t h, std::vector<double>* p) {
  const std::int64_t j = h / (shape.heads / shape.kv_heads);
  p->resize(static_cast<std::size_t>(shape.keys - shape.queries + t + 1));
  for (std::size_t i = 0; i < p->size(); ++i)
    (*p)[i] =
        shape.scale * dot(q + (t * shape.heads + h) * shape.width,
                          k + (static_cast<std::int64_t>(i) * shape.kv_heads + j) * shape.width,
                          shape.width);
  const double largest = *std::max_element(p->begin(), p->end());
  double sum = 0;
  for (double& x : *p) sum += x = std::exp(x - largest);
  for (double& x : *p) x /= sum;
  return largest + std::log(sum);
}

}  // namespace

void attention(const AttentionShape& shape, const double* q, const double* k, const double* v,
               double* out, double* lse2) {
  const std::int64_t H = shape.heads, J = shape.kv_heads, Kv = shape.value_width;
  std::vector<double> p;
  for (std::int64_t t = 0; t < shape.queries; ++t)
    for (std::int64_t h = 0; h < H; ++h) {
      const double lse = probabilities(shape, q, k, t, h, &p);
      if (lse2 != nullptr) lse2[t * H + h] = lse / std::log(2.0);
      double* o = out + (t * H + h) * Kv;
      std::fill(o, o + Kv, 0.0);
      for (std::size_t i = 0; i < p.size(); ++i)
        for (std::int64_t d = 0; d < Kv; ++d)
          o[d] += p[i] * v[(static_cast<std::int64_t>(i) * J + h / (H / J)) * Kv + d];
    }
}

void attention_backward(const AttentionShape& shape, const double* q, const double* k,
                        const double* v, const double* d_out, double* d_q, double* d_k,
                        double* d_v) {
  const std::int64_t H = shape.heads, J = shape.kv_heads, K = shape.width, Kv = shape.value_width;
  std::fill(d_q, d_q + shape.queries * H * K, 0.0);
  std::fill(d_k, d_k + shape.keys * J * K, 0.0);
  std::fill(d_v, d_v + shape.keys * J * Kv, 0.0);
  std::vector<double> p, dp;
  for (std::int64_t t = 0; t < shape.queries; ++t)
    for (std::int64_t h = 0; h < H; ++h) {
      probabilities(shape, q, k, t, h, &p);
      const double* g = d_out + (t * H + h) * Kv;
      const std::int64_t j = h / (H / J);
      dp.resize(p.size());
      double mean = 0;  // of dp under p
      for (std::size_t i = 0; i < p.size(); ++i) {
        dp[i] = dot(g, v + (static_cast<std::int64_t>(i) * J + j) * Kv, Kv);
        mean += p[i] * dp[i];
      }
      for (std::size_t i = 0; i < p.size(); ++i) {
        const std::int64_t row = static_cast<std::int64_t>(i) * J + j;
        const double ds = shape.scale * p[i] * (dp[i] - mean);
        for (std::int64_t d = 0; d < Kv; ++d) d_v[row * Kv + d] += p[i] * g[d];
        for (std::int64_t d = 0; d < K; ++d) {
          d_q[(t * H + h) * K + d] += ds * k[row * K + d];
          d_k[row * K + d] += ds * q[(t * H + h) * K + d];
        }
      }
    }
}

}  // namespace lockstep::ops::reference

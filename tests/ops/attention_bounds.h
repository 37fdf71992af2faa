// The double reference of attention on one sequence of a case, with a bound of what the contract's
// roundings may add to each element.
#pragma once

#include "ops/attention_case.h"

namespace lockstep::ops::test {

inline constexpr double kBf16Unit = 0x1p-8;       // BF16 rounding, relative
inline constexpr double kFloatUnit = 0x1p-24;     // FP32 rounding, relative
inline constexpr double kSoftmaxError = 1.03e-4;  // exp2_softmax, relative
inline constexpr double kLn2 = 0.6931471805599453;

// A chain of n products whose magnitudes sum to `magnitude`: a step cuts 17 terms at 2^-25 of the
// largest and the result at 2^-23.
inline double chain_error(double n, double magnitude) {
  return std::ceil(n / 16) * (17 * 0x1p-25 + 0x1p-23) * 1.01 * magnitude;
}

inline std::vector<double> sequence_values(const AttentionCase& x, const TensorView& packed,
                                           std::size_t s) {
  return values(packed.rows(x.begin(s), x.lengths[s]));
}

inline reference::AttentionShape reference_shape(const AttentionCase& x, std::size_t s) {
  const AttentionSizes& n = x.sizes;
  return {x.lengths[s], x.lengths[s], n.H, n.J, n.K, n.Kv, n.scale};
}

struct ReferenceForward {
  std::vector<double> out, lse2, out_bound, lse2_bound;
  // [t][h][i], i up to t: probability and the relative error of 2^(s c - lse2) without exp2's own.
  std::vector<double> p, score_error;
};

inline ReferenceForward reference_forward(const AttentionCase& x, std::size_t s) {
  const AttentionSizes& n = x.sizes;
  const std::int64_t L = x.lengths[s];
  const auto q = sequence_values(x, x.q_THK, s), k = sequence_values(x, x.k_TJK, s),
             v = sequence_values(x, x.v_TJK, s);
  const auto index = [](std::int64_t i) { return static_cast<std::size_t>(i); };
  ReferenceForward r;
  r.out.resize(index(L * n.H * n.Kv));
  r.lse2.resize(index(L * n.H));
  r.out_bound = r.out;
  r.lse2_bound = r.lse2;
  r.p.assign(index(L * n.H * L), 0.0);
  r.score_error = r.p;
  reference::attention(reference_shape(x, s), q.data(), k.data(), v.data(), r.out.data(),
                       r.lse2.data());
  for (std::int64_t t = 0; t < L; ++t)
    for (std::int64_t h = 0; h < n.H; ++h) {
      const std::int64_t place = t * n.H + h, j = h / (n.H / n.J);
      double largest = 0, chain = 0;
      for (std::int64_t i = 0; i <= t; ++i) {
        double score = 0, magnitude = 0;
        for (std::int64_t d = 0; d < n.K; ++d) {
          const double product = q[index(place * n.K + d)] * k[index((i * n.J + j) * n.K + d)];
          score += product;
          magnitude += std::abs(product);
        }
        r.p[index(place * L + i)] = std::exp(n.scale * score - kLn2 * r.lse2[index(place)]);
        largest = std::max(largest, n.scale * std::abs(score));
        chain = std::max(chain, n.scale * chain_error(static_cast<double>(n.K), magnitude));
      }
      // Scores in nats; s c, m c, their difference and c itself are rounded. The same for lse2.
      const double score_error = chain + 6 * kFloatUnit * largest;
      const double blocks = std::ceil(static_cast<double>(t + 1) / 128);
      const double weight = (1 + blocks) * kSoftmaxError + 2 * score_error +
                            (static_cast<double>(t) / 8 + 16 + 4 * blocks) * kFloatUnit;
      for (std::int64_t d = 0; d < n.Kv; ++d) {
        double magnitude = 0;
        for (std::int64_t i = 0; i <= t; ++i)
          magnitude += r.p[index(place * L + i)] * std::abs(v[index((i * n.J + j) * n.Kv + d)]);
        const double exact = r.out[index(place * n.Kv + d)];
        double bound = magnitude * (weight + kBf16Unit) + std::abs(exact) * weight +
                       chain_error(128 * blocks, magnitude);
        bound = 1.02 * bound + kBf16Unit * (std::abs(exact) + bound);
        r.out_bound[index(place * n.Kv + d)] = bound + 0x1p-120;
      }
      r.lse2_bound[index(place)] =
          weight / kLn2 + 8 * kFloatUnit * (std::abs(r.lse2[index(place)]) + 1);
      for (std::int64_t i = 0; i <= t; ++i)
        r.score_error[index(place * L + i)] =
            score_error + kLn2 * (r.lse2_bound[index(place)] + 2 * kFloatUnit * largest);
    }
  return r;
}

struct ReferenceBackward {
  std::vector<double> d_q, d_k, d_v, d_q_bound, d_k_bound, d_v_bound;
};

inline ReferenceBackward reference_backward(const AttentionCase& x, const TensorView& d_out_THK,
                                            std::size_t s) {
  const AttentionSizes& n = x.sizes;
  const std::int64_t L = x.lengths[s];
  const auto index = [](std::int64_t i) { return static_cast<std::size_t>(i); };
  const auto q = sequence_values(x, x.q_THK, s), k = sequence_values(x, x.k_TJK, s),
             v = sequence_values(x, x.v_TJK, s), g = sequence_values(x, d_out_THK, s);
  const ReferenceForward f = reference_forward(x, s);
  ReferenceBackward r;
  r.d_q.resize(q.size());
  r.d_k.resize(k.size());
  r.d_v.resize(v.size());
  reference::attention_backward(reference_shape(x, s), q.data(), k.data(), v.data(), g.data(),
                                r.d_q.data(), r.d_k.data(), r.d_v.data());
  // First the sums of errors and of magnitudes, then the roundings at the end.
  r.d_q_bound.assign(q.size(), 0.0);
  r.d_k_bound.assign(k.size(), 0.0);
  r.d_v_bound.assign(v.size(), 0.0);
  const double steps = static_cast<double>(L) + 128;
  for (std::int64_t t = 0; t < L; ++t)
    for (std::int64_t h = 0; h < n.H; ++h) {
      const std::int64_t place = t * n.H + h, j = h / (n.H / n.J);
      double delta = 0, delta_error = 0;
      for (std::int64_t d = 0; d < n.Kv; ++d) {
        const std::size_t at = index(place * n.Kv + d);
        delta += g[at] * f.out[at];
        delta_error += std::abs(g[at]) * (f.out_bound[at] + 2 * kFloatUnit * std::abs(f.out[at]) *
                                                                static_cast<double>(n.Kv));
      }
      for (std::int64_t i = 0; i <= t; ++i) {
        const std::int64_t row = i * n.J + j;
        const double p = f.p[index(place * L + i)];
        const double p_error =
            p * 1.02 * (kSoftmaxError + f.score_error[index(place * L + i)]) + 0x1p-120;
        double dp = 0, dp_magnitude = 0;
        for (std::int64_t d = 0; d < n.Kv; ++d) {
          const double product = g[index(place * n.Kv + d)] * v[index(row * n.Kv + d)];
          dp += product;
          dp_magnitude += std::abs(product);
        }
        const double ds = p * (dp - delta);
        const double difference_error =
            chain_error(static_cast<double>(n.Kv), dp_magnitude) + delta_error;
        double ds_error = p_error * (std::abs(dp - delta) + difference_error) +
                          p * difference_error + 2 * kFloatUnit * std::abs(ds);
        ds_error += kBf16Unit * (std::abs(ds) + ds_error);
        const double ds_total = ds_error + chain_error(steps, std::abs(ds) + ds_error);
        const double p_total = p_error + kBf16Unit * (p + p_error) + chain_error(steps, p * 1.1);
        for (std::int64_t d = 0; d < n.K; ++d) {
          r.d_q_bound[index(place * n.K + d)] +=
              n.scale * ds_total * std::abs(k[index(row * n.K + d)]);
          r.d_k_bound[index(row * n.K + d)] +=
              n.scale * ds_total * std::abs(q[index(place * n.K + d)]);
        }
        for (std::int64_t d = 0; d < n.Kv; ++d)
          r.d_v_bound[index(row * n.Kv + d)] += p_total * std::abs(g[index(place * n.Kv + d)]);
      }
    }
  const auto round = [](const std::vector<double>& exact, std::vector<double>* bound) {
    for (std::size_t i = 0; i < exact.size(); ++i)
      (*bound)[i] = 1.001 * (*bound)[i] + kBf16Unit * (std::abs(exact[i]) + (*bound)[i]) + 0x1p-120;
  };
  round(r.d_q, &r.d_q_bound);
  round(r.d_k, &r.d_k_bound);
  round(r.d_v, &r.d_v_bound);
  return r;
}

}  // namespace lockstep::ops::test

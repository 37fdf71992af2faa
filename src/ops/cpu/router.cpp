#include "ops/cpu/router.h"

#include <omp.h>

#include "numerics/reduce.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// strided_sum of a row that is padded with zeros to a multiple of 32: adding +0 changes no bits.
float row_sum(const float* x, std::int64_t padded) {
  float lane[32] = {};
  for (std::int64_t i = 0; i < padded; i += 32)
    for (int l = 0; l < 32; ++l) lane[l] = lane[l] + x[i + l];
  return numerics::butterfly_sum(lane);
}

float row_dot(const float* x, const float* y, std::int64_t padded) {
  float lane[32] = {};
  for (std::int64_t i = 0; i < padded; i += 32)
    for (int l = 0; l < 32; ++l) lane[l] = numerics::fma(x[i + l], y[i + l], lane[l]);
  return numerics::butterfly_sum(lane);
}

void pad(float* x, std::int64_t n) {
  for (std::int64_t i = n; i < router_row(n); ++i) x[i] = 0.0f;
}

void row_scores(const float* z, std::int64_t E, RouterScore kind, float* s) {
  if (kind == RouterScore::kSigmoid) {
    for (std::int64_t e = 0; e < E; ++e) s[e] = numerics::sigmoid(z[e]);
    pad(s, E);
    return;
  }
  float max = -kInfinity;
  for (std::int64_t e = 0; e < E; ++e) max = z[e] > max ? z[e] : max;
  for (std::int64_t e = 0; e < E; ++e) s[e] = numerics::exp(z[e] - max);
  pad(s, E);
  const float sum = row_sum(s, router_row(E));
  for (std::int64_t e = 0; e < E; ++e) s[e] = s[e] / sum;
}

// Ascending with the value, then descending with the index; never 0. NaN sorts first, -0 equals +0.
std::uint64_t order_key(float value, std::int64_t index) {
  const std::uint32_t u = numerics::float_bits(value + 0.0f);
  std::uint32_t key = (u >> 31) != 0 ? ~u : u | 0x80000000u;
  if (numerics::is_nan(value)) key = 0;
  return static_cast<std::uint64_t>(key) << 32 | (0xFFFFFFFFu - static_cast<std::uint32_t>(index));
}

// Takes the largest key out and returns its index.
std::int64_t take_best(std::uint64_t* keys, std::int64_t n) {
  std::uint64_t best = 0;
  for (std::int64_t i = 0; i < n; ++i) best = keys[i] > best ? keys[i] : best;
  const std::int64_t index = 0xFFFFFFFFu - static_cast<std::uint32_t>(best);
  keys[index] = 0;
  return index;
}

// Group value: its two best selection values, larger first; a group of one uses that one.
float group_value(const std::uint64_t* keys, const float* value, std::int64_t begin,
                  std::int64_t size) {
  std::uint64_t first = 0, second = 0;
  std::int64_t i1 = begin, i2 = begin;
  for (std::int64_t e = begin; e < begin + size; ++e) {
    if (keys[e] > first) {
      second = first;
      i2 = i1;
      first = keys[e];
      i1 = e;
    } else if (keys[e] > second) {
      second = keys[e];
      i2 = e;
    }
  }
  return size == 1 ? value[i1] : value[i1] + value[i2];
}

void limit_groups(std::uint64_t* keys, const float* value, std::int64_t E,
                  const RouterOptions& options) {
  const std::int64_t size = E / options.groups;
  std::uint64_t* group_keys = keys + E;
  for (int g = 0; g < options.groups; ++g)
    group_keys[g] = order_key(group_value(keys, value, g * size, size), g);
  for (int i = 0; i < options.top_groups; ++i) take_best(group_keys, options.groups);
  for (int g = 0; g < options.groups; ++g)
    if (group_keys[g] != 0)
      for (std::int64_t e = g * size; e < (g + 1) * size; ++e) keys[e] = 0;
}

// Divisor of normalised weights: the chosen scores in slot order, and eps.
float weight_divisor(const float* s, const std::int32_t* experts, const RouterOptions& options) {
  float sum = 0.0f;
  for (int c = 0; c < options.top_k; ++c) sum = sum + s[experts[c]];
  return sum + (options.score == RouterScore::kSigmoid ? 1e-20f : 0.0f);
}

void route_token(const float* z, const float* bias, std::int64_t E, const RouterOptions& options,
                 float* s, float* value, std::uint64_t* keys, float* weights,
                 std::int32_t* experts) {
  row_scores(z, E, options.score, s);
  for (std::int64_t e = 0; e < E; ++e) value[e] = bias != nullptr ? s[e] + bias[e] : s[e];
  for (std::int64_t e = 0; e < E; ++e) keys[e] = order_key(value[e], e);
  if (options.top_groups < options.groups) limit_groups(keys, value, E, options);
  for (int c = 0; c < options.top_k; ++c)
    experts[c] = static_cast<std::int32_t>(take_best(keys, E));
  const float divisor = weight_divisor(s, experts, options);
  for (int c = 0; c < options.top_k; ++c) {
    const float u = options.normalize ? s[experts[c]] / divisor : s[experts[c]];
    weights[c] = u * options.scaling;
  }
}

// Balance scores q of a token, in place.
void balance_scores(float* s, std::int64_t E, RouterScore kind) {
  if (kind != RouterScore::kSigmoid) return;
  const float sum = row_sum(s, router_row(E));
  for (std::int64_t e = 0; e < E; ++e) s[e] = s[e] / sum;
}

// Score gradient from the load-balancing loss alone.
void score_gradient(const float* s, const float* d_score, std::int64_t E, RouterScore kind,
                    float* q, float* ds) {
  const std::int64_t padded = router_row(E);
  for (std::int64_t e = 0; e < padded; ++e) ds[e] = d_score != nullptr && e < E ? d_score[e] : 0.0f;
  if (kind != RouterScore::kSigmoid || d_score == nullptr) return;
  const float sum = row_sum(s, padded);
  for (std::int64_t e = 0; e < padded; ++e) q[e] = s[e] / sum;
  const float dot = row_dot(ds, q, padded);
  for (std::int64_t e = 0; e < E; ++e) ds[e] = (ds[e] - dot) / sum;
}

void token_backward(const float* z, const std::int32_t* experts, const float* d_weights,
                    const float* d_score, std::int64_t E, const RouterOptions& options, float* s,
                    float* q, float* ds, float* dz) {
  row_scores(z, E, options.score, s);
  score_gradient(s, d_score, E, options.score, q, ds);
  const float divisor = weight_divisor(s, experts, options);
  float dot = 0.0f;
  if (options.normalize)
    for (int c = 0; c < options.top_k; ++c)
      dot = numerics::fma(d_weights[c] * options.scaling, s[experts[c]] / divisor, dot);
  for (int c = 0; c < options.top_k; ++c) {
    const float b = d_weights[c] * options.scaling;
    ds[experts[c]] = ds[experts[c]] + (options.normalize ? (b - dot) / divisor : b);
  }
  if (options.score == RouterScore::kSigmoid) {
    for (std::int64_t e = 0; e < E; ++e) dz[e] = ds[e] * (s[e] * (1.0f - s[e]));
  } else {
    const float mean = row_dot(ds, s, router_row(E));
    for (std::int64_t e = 0; e < E; ++e) dz[e] = s[e] * (ds[e] - mean);
  }
}

float* thread_row(const RouterShape& shape, int row) {
  return shape.rows + (omp_get_thread_num() * kRouterRows + row) * router_row(shape.E);
}

}  // namespace

void router(const RouterShape& shape, const RouterOptions& options, const float* logits,
            const float* bias, float* weights, std::int32_t* experts) {
#pragma omp parallel for num_threads(shape.threads) schedule(static)
  for (std::int64_t t = 0; t < shape.T; ++t)
    route_token(logits + t * shape.E, bias, shape.E, options, thread_row(shape, 0),
                thread_row(shape, 1),
                shape.keys + omp_get_thread_num() * (shape.E + options.groups),
                weights + t * options.top_k, experts + t * options.top_k);
}

void router_backward(const RouterShape& shape, const RouterOptions& options, const float* logits,
                     const std::int32_t* experts, const float* d_weights, const float* d_score,
                     float* d_logits) {
#pragma omp parallel for num_threads(shape.threads) schedule(static)
  for (std::int64_t t = 0; t < shape.T; ++t)
    token_backward(logits + t * shape.E, experts + t * options.top_k, d_weights + t * options.top_k,
                   d_score, shape.E, options, thread_row(shape, 0), thread_row(shape, 1),
                   thread_row(shape, 2), d_logits + t * shape.E);
}

void router_mean_scores(const RouterShape& shape, const RouterOptions& options, const float* logits,
                        double* block_sums, double* sum) {
  const std::int64_t blocks = (shape.T + kRouterTokenBlock - 1) / kRouterTokenBlock;
#pragma omp parallel for num_threads(shape.threads) schedule(static)
  for (std::int64_t b = 0; b < blocks; ++b) {
    float* s = thread_row(shape, 0);
    double* acc = block_sums + b * shape.E;
    for (std::int64_t e = 0; e < shape.E; ++e) acc[e] = 0.0;
    const std::int64_t begin = b * kRouterTokenBlock;
    const std::int64_t end =
        begin + kRouterTokenBlock < shape.T ? begin + kRouterTokenBlock : shape.T;
    for (std::int64_t t = begin; t < end; ++t) {
      row_scores(logits + t * shape.E, shape.E, options.score, s);
      balance_scores(s, shape.E, options.score);
      for (std::int64_t e = 0; e < shape.E; ++e) acc[e] = acc[e] + static_cast<double>(s[e]);
    }
  }
  for (std::int64_t e = 0; e < shape.E; ++e) sum[e] = 0.0;
  for (std::int64_t b = 0; b < blocks; ++b)
    for (std::int64_t e = 0; e < shape.E; ++e) sum[e] = sum[e] + block_sums[b * shape.E + e];
}

void balance_gradient(std::int64_t E, const BalanceFactors& factors, const std::int32_t* offsets,
                      const double* sum, float* d_score, double* value) {
  const double C = static_cast<double>(factors.top_k), T = static_cast<double>(factors.tokens);
  for (std::int64_t e = 0; e < E; ++e) {
    const double rows = static_cast<double>(offsets[e + 1] - offsets[e]);
    const double slope =
        factors.coefficient * factors.weight * static_cast<double>(E) * rows / (C * T * T);
    d_score[e] = static_cast<float>(slope);
    *value = *value + slope * sum[e];
  }
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA

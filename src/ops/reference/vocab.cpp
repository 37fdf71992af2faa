#include "ops/reference/vocab.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace lockstep::ops::reference {

Distribution vocab_over(const std::vector<double>& logits, const RowSampling& sampling,
                        const std::vector<int>& kept) {
  const double t = sampling.temperature == 0.0f ? 1.0 : static_cast<double>(sampling.temperature);
  Distribution d;
  for (const double x : logits) d.z.push_back(x / t);
  d.kept = kept;
  d.p.assign(logits.size(), 0.0);
  d.logprob.assign(logits.size(), -std::numeric_limits<double>::infinity());
  double max = d.z[kept[0]], sum = 0;
  for (const int v : kept) max = std::max(max, d.z[v]);
  for (const int v : kept) sum += std::exp(d.z[v] - max);
  for (const int v : kept) {
    d.logprob[v] = d.z[v] - max - std::log(sum);
    d.p[v] = std::exp(d.logprob[v]);
    if (d.p[v] > 0) d.entropy -= d.p[v] * d.logprob[v];
  }
  return d;
}

Distribution vocab(const std::vector<double>& logits, const RowSampling& sampling) {
  std::vector<int> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  while (std::isinf(logits[order.back()])) order.pop_back();
  if (sampling.temperature == 0.0f) return vocab_over(logits, sampling, order);

  if (sampling.min_p > 0.0f) {
    const Distribution all = vocab_over(logits, sampling, order);
    const double bound = std::min(1.0, static_cast<double>(sampling.min_p)) * all.p[order[0]];
    while (all.p[order.back()] < bound) order.pop_back();
  }
  if (sampling.top_k > 0 && order.size() > static_cast<std::size_t>(sampling.top_k))
    order.resize(sampling.top_k);
  if (sampling.top_p < 1.0f) {
    const Distribution left = vocab_over(logits, sampling, order);
    double sum = 0;
    std::size_t n = 0;
    while (n < order.size() && (n == 0 || sum < static_cast<double>(sampling.top_p)))
      sum += left.p[order[n++]];
    order.resize(n);
  }
  return vocab_over(logits, sampling, order);
}

std::vector<double> vocab_backward(const Distribution& d, int target, double g,
                                   const RowSampling& sampling) {
  const double t = sampling.temperature == 0.0f ? 1.0 : static_cast<double>(sampling.temperature);
  std::vector<double> out(d.p.size(), 0.0);
  for (const int v : d.kept) out[v] = ((v == target ? 1.0 : 0.0) - d.p[v]) * g / t;
  return out;
}

}  // namespace lockstep::ops::reference

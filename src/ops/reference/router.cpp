#include "ops/reference/router.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace lockstep::ops::reference {

namespace {

std::vector<double> all_scores(const std::vector<double>& z, RouterScore kind) {
  std::vector<double> s(z.size());
  if (kind == RouterScore::kSigmoid) {
    for (std::size_t e = 0; e < z.size(); ++e) s[e] = 1.0 / (1.0 + std::exp(-z[e]));
    return s;
  }
  const double max = *std::max_element(z.begin(), z.end());
  for (std::size_t e = 0; e < z.size(); ++e) s[e] = std::exp(z[e] - max);
  const double sum = std::accumulate(s.begin(), s.end(), 0.0);
  for (double& x : s) x /= sum;
  return s;
}

// Indices by descending value; equal values keep their order.
std::vector<int> descending(const std::vector<double>& value) {
  std::vector<int> order(value.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return value[a] > value[b]; });
  return order;
}

}  // namespace

std::vector<double> router_weights(const std::vector<double>& scores,
                                   const std::vector<int>& experts, const RouterOptions& options) {
  double sum = 0;
  for (const int e : experts) sum += scores[e];
  if (options.score == RouterScore::kSigmoid) sum += 1e-20;
  std::vector<double> w;
  for (const int e : experts)
    w.push_back(static_cast<double>(options.scaling) * scores[e] / (options.normalize ? sum : 1.0));
  return w;
}

Routed router(const std::vector<double>& logits, const std::vector<double>& bias,
              const RouterOptions& options) {
  Routed out;
  out.scores = out.balance = all_scores(logits, options.score);
  if (options.score == RouterScore::kSigmoid) {
    const double sum = std::accumulate(out.scores.begin(), out.scores.end(), 0.0);
    for (double& x : out.balance) x /= sum;
  }
  std::vector<double> value = out.scores;
  for (std::size_t e = 0; e < bias.size(); ++e) value[e] += bias[e];

  const std::size_t size = value.size() / static_cast<std::size_t>(options.groups);
  std::vector<double> group(options.groups);
  for (int g = 0; g < options.groups; ++g) {
    std::vector<double> members(value.begin() + g * size, value.begin() + (g + 1) * size);
    std::sort(members.rbegin(), members.rend());
    group[g] = size == 1 ? members[0] : members[0] + members[1];
  }
  std::vector<int> groups = descending(group);
  groups.resize(options.top_groups);
  for (const int e : descending(value)) {
    const int g = e / static_cast<int>(size);
    const bool allowed = std::find(groups.begin(), groups.end(), g) != groups.end();
    if (allowed && static_cast<int>(out.experts.size()) < options.top_k) out.experts.push_back(e);
  }
  out.weights = router_weights(out.scores, out.experts, options);
  return out;
}

std::vector<double> router_backward(const std::vector<double>& logits,
                                    const std::vector<int>& experts,
                                    const std::vector<double>& d_weights,
                                    const std::vector<double>& d_balance,
                                    const RouterOptions& options) {
  const std::vector<double> s = all_scores(logits, options.score);
  const std::size_t E = s.size(), C = experts.size();
  const double scaling = static_cast<double>(options.scaling);
  double chosen = options.score == RouterScore::kSigmoid ? 1e-20 : 0.0, all = 0;
  for (const int e : experts) chosen += s[e];
  for (const double x : s) all += x;

  std::vector<double> ds(E, 0.0);
  for (std::size_t c = 0; c < C; ++c)  // d weight_c / d score of slot j
    for (std::size_t j = 0; j < C; ++j) {
      double jacobian = c == j ? scaling : 0.0;
      if (options.normalize)
        jacobian = scaling * ((c == j ? 1.0 : 0.0) / chosen - s[experts[c]] / (chosen * chosen));
      ds[experts[j]] += d_weights[c] * jacobian;
    }
  for (std::size_t i = 0; i < d_balance.size(); ++i) {  // d balance_i / d score_j
    if (options.score == RouterScore::kSoftmax) {
      ds[i] += d_balance[i];
      continue;
    }
    for (std::size_t j = 0; j < E; ++j)
      ds[j] += d_balance[i] * ((i == j ? 1.0 : 0.0) / all - s[i] / (all * all));
  }

  std::vector<double> dz(E, 0.0);
  for (std::size_t i = 0; i < E; ++i) {
    if (options.score == RouterScore::kSigmoid) {
      dz[i] = ds[i] * s[i] * (1.0 - s[i]);
      continue;
    }
    for (std::size_t j = 0; j < E; ++j) dz[j] += ds[i] * s[i] * ((i == j ? 1.0 : 0.0) - s[j]);
  }
  return dz;
}

}  // namespace lockstep::ops::reference

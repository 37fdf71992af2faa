#include "ops/reference/permute.h"

#include <algorithm>
#include <tuple>

namespace lockstep::ops::reference {

Plan plan_permutation(const std::vector<int>& experts_TC, int C, int E) {
  std::vector<std::tuple<int, int, int>> slots;  // expert, token, slot
  for (int i = 0; i < static_cast<int>(experts_TC.size()); ++i)
    slots.emplace_back(experts_TC[i], i / C, i % C);
  std::sort(slots.begin(), slots.end());
  Plan plan;
  plan.row.resize(slots.size());
  for (const auto& [expert, token, slot] : slots) {
    plan.row[token * C + slot] = static_cast<int>(plan.token.size());
    plan.token.push_back(token);
  }
  plan.offsets = plan.padded_offsets = {0};
  for (int e = 0; e < E; ++e) {
    const int n = static_cast<int>(std::count(experts_TC.begin(), experts_TC.end(), e));
    plan.offsets.push_back(plan.offsets.back() + n);
    plan.padded_offsets.push_back(plan.padded_offsets.back() + (n + 127) / 128 * 128);
  }
  return plan;
}

std::vector<double> permute(const std::vector<double>& h_TD, int D, const std::vector<int>& token) {
  std::vector<double> out;
  for (const int t : token)
    for (int d = 0; d < D; ++d) out.push_back(h_TD[t * D + d]);
  return out;
}

std::vector<double> combine(const std::vector<double>& o_MD, int D,
                            const std::vector<double>& weights_TC, int C,
                            const std::vector<int>& row_TC, const std::vector<double>& shared_TD) {
  std::vector<double> y(row_TC.size() / C * D, 0.0);
  for (std::size_t i = 0; i < row_TC.size(); ++i)
    for (int d = 0; d < D; ++d) y[i / C * D + d] += weights_TC[i] * o_MD[row_TC[i] * D + d];
  for (std::size_t i = 0; i < shared_TD.size(); ++i) y[i] += shared_TD[i];
  return y;
}

CombineGradient combine_backward(const std::vector<double>& dy_TD, const std::vector<double>& o_MD,
                                 int D, const std::vector<double>& weights_TC, int C,
                                 const std::vector<int>& row_TC) {
  CombineGradient g{std::vector<double>(o_MD.size(), 0.0),
                    std::vector<double>(weights_TC.size(), 0.0)};
  for (std::size_t i = 0; i < row_TC.size(); ++i)
    for (int d = 0; d < D; ++d) {
      const double dy = dy_TD[i / C * D + d];
      g.d_o_MD[row_TC[i] * D + d] += weights_TC[i] * dy;
      g.d_weights_TC[i] += dy * o_MD[row_TC[i] * D + d];
    }
  return g;
}

std::vector<double> permute_backward(const std::vector<double>& d_x_MD, int D, int T,
                                     const std::vector<int>& token) {
  std::vector<double> d_h(static_cast<std::size_t>(T) * D, 0.0);
  for (std::size_t r = 0; r < token.size(); ++r)
    for (int d = 0; d < D; ++d) d_h[token[r] * D + d] += d_x_MD[r * D + d];
  return d_h;
}

}  // namespace lockstep::ops::reference

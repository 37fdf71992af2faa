// Double-precision oracle of ops/router.h, written from the maths.
#pragma once

#include <vector>

#include "ops/router.h"

namespace lockstep::ops::reference {

// One token. Scores and balance scores (softmax: the same; sigmoid: over their sum) of all experts;
// chosen experts in slot order with their weights.
struct Routed {
  std::vector<double> scores, balance;
  std::vector<int> experts;
  std::vector<double> weights;
};

// bias may be empty.
Routed router(const std::vector<double>& logits, const std::vector<double>& bias,
              const RouterOptions& options);

// Weights of given experts (the choice is a constant of the backward).
std::vector<double> router_weights(const std::vector<double>& scores,
                                   const std::vector<int>& experts, const RouterOptions& options);

// d loss / d logits of one token, where d_weights = d loss / d weights and d_balance (or empty) =
// d loss / d balance scores. By the Jacobians, one entry at a time.
std::vector<double> router_backward(const std::vector<double>& logits,
                                    const std::vector<int>& experts,
                                    const std::vector<double>& d_weights,
                                    const std::vector<double>& d_balance,
                                    const RouterOptions& options);

}  // namespace lockstep::ops::reference

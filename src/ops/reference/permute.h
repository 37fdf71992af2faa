// Double-precision oracle of ops/permute.h, written from the maths. Tensors are flat, last axis
// fastest.
#pragma once

#include <vector>

namespace lockstep::ops::reference {

struct Plan {
  std::vector<int> offsets, padded_offsets;  // [E + 1]
  std::vector<int> row;                      // [T, C]
  std::vector<int> token;                    // [M]
};

Plan plan_permutation(const std::vector<int>& experts_TC, int C, int E);

std::vector<double> permute(const std::vector<double>& h_TD, int D, const std::vector<int>& token);

// shared may be empty.
std::vector<double> combine(const std::vector<double>& o_MD, int D,
                            const std::vector<double>& weights_TC, int C,
                            const std::vector<int>& row_TC, const std::vector<double>& shared_TD);

struct CombineGradient {
  std::vector<double> d_o_MD, d_weights_TC;
};
CombineGradient combine_backward(const std::vector<double>& dy_TD, const std::vector<double>& o_MD,
                                 int D, const std::vector<double>& weights_TC, int C,
                                 const std::vector<int>& row_TC);

// Transpose of permute.
std::vector<double> permute_backward(const std::vector<double>& d_x_MD, int D, int T,
                                     const std::vector<int>& token);

}  // namespace lockstep::ops::reference

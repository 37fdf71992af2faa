// Token embedding in double precision: w [V, D], x [T, D].
#pragma once

#include <cstdint>
#include <vector>

namespace lockstep::ops::reference {

std::vector<double> embedding(const std::vector<std::int64_t>& tokens, const std::vector<double>& w,
                              std::int64_t D);
// The gradient of w, [V, D].
std::vector<double> embedding_backward(const std::vector<std::int64_t>& tokens,
                                       const std::vector<double>& dx, std::int64_t V,
                                       std::int64_t D);

}  // namespace lockstep::ops::reference

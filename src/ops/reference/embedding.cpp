#include "ops/reference/embedding.h"

namespace lockstep::ops::reference {

std::vector<double> embedding(const std::vector<std::int64_t>& tokens, const std::vector<double>& w,
                              std::int64_t D) {
  std::vector<double> x;
  for (const std::int64_t token : tokens)
    x.insert(x.end(), w.begin() + token * D, w.begin() + (token + 1) * D);
  return x;
}

std::vector<double> embedding_backward(const std::vector<std::int64_t>& tokens,
                                       const std::vector<double>& dx, std::int64_t V,
                                       std::int64_t D) {
  std::vector<double> dw(static_cast<std::size_t>(V * D));
  const auto width = static_cast<std::size_t>(D);
  for (std::size_t i = 0; i < dx.size(); ++i)
    dw[static_cast<std::size_t>(tokens[i / width]) * width + i % width] += dx[i];
  return dw;
}

}  // namespace lockstep::ops::reference

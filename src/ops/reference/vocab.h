// Double-precision oracle of ops/vocab.h, written from the maths.
#pragma once

#include <vector>

#include "ops/vocab.h"

namespace lockstep::ops::reference {

// One row. Tokens outside the kept set have p = 0 and logprob = -inf. At least one logit is finite,
// none is NaN or +inf.
struct Distribution {
  std::vector<double> z, logprob, p;
  double entropy = 0;
  std::vector<int> kept;  // by descending z, ties to the lower index
};
Distribution vocab(const std::vector<double>& logits, const RowSampling& sampling);

// The distribution over a given kept set.
Distribution vocab_over(const std::vector<double>& logits, const RowSampling& sampling,
                        const std::vector<int>& kept);

// d logprob[target] * g / d logits, the kept set a constant.
std::vector<double> vocab_backward(const Distribution& d, int target, double g,
                                   const RowSampling& sampling);

}  // namespace lockstep::ops::reference

// AdamW (Loshchilov and Hutter, arXiv 1711.05101, decoupled decay scaled by lr) and the norm of a
// gradient in double precision.
#pragma once

#include <cstdint>
#include <vector>

namespace lockstep::ops::reference {

struct Adamw {
  double lr, beta1, beta2, eps, weight_decay, clip = 1;
  std::int64_t step = 0;  // steps taken
  std::vector<double> w, m, v;
};

void adamw_step(Adamw& state, const std::vector<double>& grad);
double norm(const std::vector<double>& x);

}  // namespace lockstep::ops::reference

#include "ops/reference/quantize.h"

#include <algorithm>
#include <cmath>

namespace lockstep::ops::reference {

double nearest_e4m3(double x) {
  if (x == 0) return x;
  // Three significand bits behind the leading one; below 2^-6 the steps stay at 2^-9.
  const double step = std::ldexp(1.0, std::max(std::ilogb(x), -6) - 3);
  return std::clamp(std::nearbyint(x / step) * step, -448.0, 448.0);
}

double e4m3_scale(double amax, bool pow2) {
  if (amax == 0) return 1;
  const double s = std::max(amax / 448, std::ldexp(1.0, -100));
  return pow2 ? std::exp2(std::ceil(std::log2(s))) : s;
}

std::vector<double> fake_quantize(const std::vector<double>& x,
                                  const std::vector<std::int64_t>& block, bool pow2) {
  std::vector<double> amax;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const auto b = static_cast<std::size_t>(block[i]);
    if (b >= amax.size()) amax.resize(b + 1);
    amax[b] = std::max(amax[b], std::fabs(x[i]));
  }
  std::vector<double> out(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double s = e4m3_scale(amax[static_cast<std::size_t>(block[i])], pow2);
    out[i] = nearest_e4m3(x[i] / s) * s;
  }
  return out;
}

}  // namespace lockstep::ops::reference

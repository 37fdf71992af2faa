// RMSNorm and per-head norm with rotary embedding in double precision, forward and backward.
// Row-major vectors with the shapes of ops/norm.h.
#pragma once

#include <cstdint>
#include <vector>

namespace lockstep::ops::reference {

using Values = std::vector<double>;

// Rows of width w.size(): x / sqrt(mean(x^2) + eps) * w.
Values rms_norm(const Values& x, const Values& w, double eps);

struct NormGradient {
  Values dx, dw;
};
NormGradient rms_norm_backward(const Values& dh, const Values& x, const Values& w, double eps);

struct HeadNormRope {
  std::int64_t heads = 1, width = 2;
  Values w;  // empty: no norm
  double eps = 1e-6;
  double theta = 0;  // 0: no rotation
  std::vector<std::int64_t> positions;
};
// x and the result [T, H, K].
Values head_norm_rope(const HeadNormRope& op, const Values& x);
NormGradient head_norm_rope_backward(const HeadNormRope& op, const Values& d_out, const Values& x);

}  // namespace lockstep::ops::reference

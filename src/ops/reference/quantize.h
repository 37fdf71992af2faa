// The quantizer in double precision, from the definition of E4M3: what a value is after it was
// quantized and read back.
#pragma once

#include <cstdint>
#include <vector>

namespace lockstep::ops::reference {

// The E4M3 number nearest to a finite x, ties to the even significand, saturating at +-448.
double nearest_e4m3(double x);

// The scale of a block whose largest magnitude is amax: amax / 448, with `pow2` the smallest power
// of two not below it; at least 2^-100; 1 for amax = 0.
double e4m3_scale(double amax, bool pow2);

// x after quantization in blocks and back: block[i] >= 0 names the block of value i. Finite values.
std::vector<double> fake_quantize(const std::vector<double>& x,
                                  const std::vector<std::int64_t>& block, bool pow2);

}  // namespace lockstep::ops::reference

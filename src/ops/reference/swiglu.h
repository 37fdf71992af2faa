// SwiGLU in double precision. gate_up [M, 2F] with the gate in columns [0, F); results [M, F] and
// [M, 2F].
#pragma once

#include <cstdint>
#include <vector>

namespace lockstep::ops::reference {

std::vector<double> swiglu(const std::vector<double>& gate_up, std::int64_t F);
std::vector<double> swiglu_backward(const std::vector<double>& gate_up,
                                    const std::vector<double>& d_a, std::int64_t F);

}  // namespace lockstep::ops::reference

// The reduction orders of docs/numerics.md, section 3, for host code. On a GPU they are what a warp
// does naturally. Always inlined: files of ops/cpu are compiled for several instruction sets and
// must not share a copy.
#pragma once

#include <cstdint>

#include "numerics/math.h"

namespace lockstep::numerics {

// Five butterfly rounds over 32 lanes; every lane ends with the same bits, lane 0 is returned.
template <typename T>
[[gnu::always_inline]] inline T butterfly_sum(T (&lane)[32]) {
  for (int d = 16; d >= 1; d /= 2) {
    T next[32];
    for (int l = 0; l < 32; ++l) next[l] = lane[l] + lane[l ^ d];
    for (int l = 0; l < 32; ++l) lane[l] = next[l];
  }
  return lane[0];
}

// Element i goes to lane (i/8) % 32, ascending; step(i, acc) returns the lane's new accumulator.
// The lanes advance together, so that the compiler can vectorise over them.
template <typename T, typename Step>
[[gnu::always_inline]] inline T lane_sum(std::int64_t n, Step step) {
  T lane[32] = {};
  std::int64_t base = 0;
  for (; base + 256 <= n; base += 256)
    for (int k = 0; k < 8; ++k)
      for (int l = 0; l < 32; ++l) lane[l] = step(base + l * 8 + k, lane[l]);
  const std::int64_t lanes = (n - base) / 8;
  for (int k = 0; k < 8; ++k)
    for (std::int64_t l = 0; l < lanes; ++l) lane[l] = step(base + l * 8 + k, lane[l]);
  for (std::int64_t i = base + lanes * 8; i < n; ++i) lane[lanes] = step(i, lane[lanes]);
  return butterfly_sum(lane);
}

// Element i goes to lane i % 32, ascending.
template <typename T, typename Step>
[[gnu::always_inline]] inline T strided_sum(std::int64_t n, Step step) {
  T lane[32] = {};
  std::int64_t base = 0;
  for (; base + 32 <= n; base += 32)
    for (int l = 0; l < 32; ++l) lane[l] = step(base + l, lane[l]);
  for (std::int64_t i = base; i < n; ++i) lane[i - base] = step(i, lane[i - base]);
  return butterfly_sum(lane);
}

// Adds 8*J values onto four lanes as an m16n8 accumulator row holds them; quad_total closes the
// sum.
inline void quad_accumulate(const float* v, int n, float (&lane)[4]) {
  for (int j = 0; j < n; j += 8)
    for (int t = 0; t < 4; ++t) lane[t] = lane[t] + (v[j + 2 * t] + v[j + 2 * t + 1]);
}
inline float quad_total(const float (&lane)[4]) {
  return (lane[0] + lane[1]) + (lane[2] + lane[3]);
}

}  // namespace lockstep::numerics

// What the forward and the backward of the CPU's attention share.
#pragma once

#include <cstddef>
#include <limits>
#include <numbers>

#include "numerics/math.h"
#include "ops/cpu/isa.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {

inline constexpr std::int64_t kBlock = numerics::kAttentionBlock;

inline float softmax_factor(double scale) {
  return static_cast<float>(scale * std::numbers::log2e);
}

// Cuts arrays out of one piece of memory, each on a line of its own; with null only counts.
struct Carver {
  std::byte* memory;
  std::int64_t used;

  template <typename T>
  T* take(std::int64_t count) {
    auto* at = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + used);
    used += (count * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64;
    return at;
  }
};

// Sets the scores behind the visible ones to -inf up to a multiple of 16 that covers `keys`, so
// that loops have whole vectors and p becomes +0 there. Returns that multiple.
inline std::int64_t pad_scores(float* s, std::int64_t visible, std::int64_t keys) {
  const std::int64_t padded = (keys + 15) / 16 * 16;
  for (std::int64_t i = visible; i < padded; ++i) s[i] = -std::numeric_limits<float>::infinity();
  return padded;
}

inline float max_score(const float* s, std::int64_t padded, float m) {
  float lane[16];
  for (float& x : lane) x = m;
  for (std::int64_t i = 0; i < padded; i += 16)
    for (int l = 0; l < 16; ++l) lane[l] = s[i + l] > lane[l] ? s[i + l] : lane[l];
  for (const float x : lane) m = x > m ? x : m;
  return m;
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA

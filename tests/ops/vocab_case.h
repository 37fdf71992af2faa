// Settings and rows for the tests of ops/vocab.h.
#pragma once

#include "ops/op_test_util.h"
#include "ops/vocab.h"

namespace lockstep::ops::test {

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

inline RowSampling settings(float temperature, int top_k = -1, float top_p = 1, float min_p = 0) {
  RowSampling s;
  s.temperature = temperature;
  s.top_k = top_k;
  s.top_p = top_p;
  s.min_p = min_p;
  return s;
}

inline const std::vector<RowSampling> kPlain = {settings(1), settings(0.7f), settings(1.7f),
                                                settings(0)};
inline const std::vector<RowSampling> kFiltered = {settings(1, 1),
                                                   settings(1, 5),
                                                   settings(0.7f, -1, 0.9f),
                                                   settings(1, -1, 0),
                                                   settings(1.3f, 40, 0.5f),
                                                   settings(1, -1, 1, 0.05f),
                                                   settings(1, -1, 1, 2),
                                                   settings(0.9f, 20, 0.8f, 0.01f),
                                                   settings(1, 100000, 0.999f)};

// Logits of one row a setting, all from one stream; some are -inf, some are equal.
inline Tensor make_logits(std::int64_t R, std::int64_t V, std::uint64_t seed) {
  Rng rng(seed);
  Tensor z = random_normal(rng, DType::kFp32, {R, V}, 3.0);
  for (std::int64_t i = 0; i < R * V; ++i) {
    const double x = uniform(rng);
    if (i % V != 0 && x < 0.05) z.as<float>()[i] = -kInf;
    if (i % V != 0 && x > 0.9) z.as<float>()[i] = z.as<float>()[i - 1];
  }
  return z;
}

inline std::vector<double> row(const TensorView& x, std::int64_t r) { return values(x.rows(r, 1)); }

inline bool is_kept(const RowStats& s, float z, std::int64_t v) {
  return z > s.cut_z || (z == s.cut_z && v <= s.cut_index);
}

inline float scaled(float logit, const RowSampling& s) {
  return logit * (s.temperature == 0.0f ? 1.0f : 1.0f / s.temperature);
}

}  // namespace lockstep::ops::test

// What the kernels of ops/vocab.h share: a row's scaling, its kept set, and how they divide the
// work. The scratch of a call, all of it written before it is read:
//   m, s, e of each block of 128 (docs/numerics.md, section 10), [R, blocks];
//   the best token that each thread block of a row drew, [R, parts];
//   the cut of each row that filters, [R].
#pragma once

#include "ops/cuda/launch.cuh"
#include "ops/vocab.h"

namespace lockstep::ops::cuda {

constexpr int kBlock = numerics::kVocabBlock;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kFloor = -128.0f;  // exp2(kFloor * LOG2E) = 0, and so is all below
constexpr std::int32_t kNoToken = INT32_MAX;

struct Cut {
  float z;
  std::int32_t index;
};
// Without branches: neighbours' arithmetic runs side by side.
__device__ inline bool kept(float z, std::int64_t v, const Cut& cut) {
  return (z > cut.z) | ((z == cut.z) & (static_cast<std::int32_t>(v) <= cut.index));
}

struct Draw {
  float score;
  std::int32_t token;
};
__device__ inline Draw better(const Draw& a, const Draw& b) {
  const bool second = b.score > a.score || (b.score == a.score && b.token < a.token);
  return second ? b : a;
}

struct RowCut {
  float max;  // NaN for a broken row
  Cut cut;
};

struct VocabWork {
  const float* logits;
  const RowSampling* sampling;
  std::int64_t V;
  int blocks;  // of 128 tokens in a row
  int parts;   // thread blocks of a row
  int groups;  // of 8 blocks that a part's warp visits
  float *m, *s, *e;
  Draw* draws;
  RowCut* cuts;
};

__device__ inline bool filters(const RowSampling& s) {
  return s.temperature != 0.0f && (s.min_p > 0.0f || s.top_k > 0 || s.top_p < 1.0f);
}
__device__ inline float inverse_temperature(const RowSampling& s) {
  return s.temperature == 0.0f ? 1.0f : 1.0f / s.temperature;
}

// A maximum that a NaN spoils.
__device__ inline float max_or_nan(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}
__device__ inline float warp_max_or_nan(float x) {
#pragma unroll
  for (int d = 16; d >= 1; d /= 2) x = max_or_nan(x, __shfl_xor_sync(0xFFFFFFFFu, x, d));
  return x;
}

__device__ inline float relative_probability(float z, float max) {
  return numerics::exp2((z - max) * numerics::kLog2e);
}

// Tokens v .. v+3, -inf behind the row's end. kWide: V is a multiple of 4 and rows are aligned.
template <bool kWide>
__device__ inline void load4(const float* row, std::int64_t v, std::int64_t V, float (&x)[4]) {
  if (kWide) {
    float4 wide = make_float4(-kInfinity, -kInfinity, -kInfinity, -kInfinity);
    if (v < V) wide = *reinterpret_cast<const float4*>(row + v);
    x[0] = wide.x, x[1] = wide.y, x[2] = wide.z, x[3] = wide.w;
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = v + k < V ? row[v + k] : -kInfinity;
  }
}

}  // namespace lockstep::ops::cuda

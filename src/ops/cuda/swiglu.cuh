// SwiGLU of eight neighbouring columns (docs/numerics.md, sections 2, 7 and 11).
#pragma once

#include "ops/cuda/quantize_block.cuh"

namespace lockstep::ops::cuda {

inline constexpr unsigned kModerateGate = 0x4270;  // 60, as BF16 bits

// numerics::sigmoid for |g| <= 60 in half the instructions (tests/gpu/swiglu_test.cpp compares
// every gate): nothing needs a clamp there. The polynomial is numerics::exp2_polynomial halved,
// which makes room for the exponent; one Newton step makes the approximate reciprocal the nearest
// one, as the division itself does.
__device__ inline float moderate_sigmoid(float g) {
  const float t = -g * numerics::kLog2e + numerics::kRoundMagic;
  const float n = t - numerics::kRoundMagic;
  float f = numerics::fma(-g, numerics::kLog2e, -n);
  f = numerics::fma(-g, numerics::kLog2eLow, f);
  float p = 0x1.41fbbap-14f;
  p = numerics::fma(p, f, 0x1.5f3e54p-11f);
  p = numerics::fma(p, f, 0x1.3b2d4cp-8f);
  p = numerics::fma(p, f, 0x1.c6aee8p-6f);
  p = numerics::fma(p, f, 0x1.ebfbdcp-4f);
  p = numerics::fma(p, f, 0x1.62e43p-2f);
  p = numerics::fma(p, f, 0.5f);
  const float e = numerics::bits_float(numerics::float_bits(p) + (numerics::float_bits(t) << 23));
  const float d = numerics::fma(e, 2.0f, 1.0f);
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
  return numerics::fma(r, numerics::fma(-d, r, 1.0f), r);
}

// For the few others: a call, so that its code is not there eight times.
static __device__ __noinline__ float any_sigmoid(float g) { return numerics::sigmoid(g); }

// Sigmoids of eight gates.
__device__ inline Float8 sigmoid8(const Bf16x8& g) {
  const std::uint32_t m = largest2(g) & kMagnitudes;
  Float8 s;
  if (max(m >> 16, m & 0xFFFFu) <= kModerateGate) {
#pragma unroll
    for (int c = 0; c < 8; ++c) s.v[c] = moderate_sigmoid(value(g, c));
  } else {
#pragma unroll
    for (int c = 0; c < 8; ++c) s.v[c] = any_sigmoid(value(g, c));
  }
  return s;
}

// numerics::sigmoid of every BF16 value, for kernels that work long enough to make it first: gates
// of magnitude 1.25 * 2^-24 to 89.5, the two signs of a magnitude side by side. Below it the
// sigmoid is 0.5 and above it 0 or 1, as at the table's ends; a NaN takes an end, and the gate
// itself makes the product a NaN.
inline constexpr unsigned kLowestGate = 0x33A0, kHighestGate = 0x42B3;  // BF16 bits
inline constexpr int kSigmoids = 2 * (kHighestGate - kLowestGate + 1);

// Every thread of the CTA calls it; a barrier has to follow. (A function of its own: it takes
// registers that its callers do not have.)
static __device__ __noinline__ void fill_sigmoids(float* table) {
  constexpr int kModerate = 2 * (kModerateGate - kLowestGate + 1);
  const auto gate = [](int i) {
    return numerics::bits_float(((kLowestGate + i / 2) | (i % 2 != 0 ? 0x8000u : 0u)) << 16);
  };
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
#pragma unroll 4
  for (int i = thread; i < kModerate; i += threads) table[i] = moderate_sigmoid(gate(i));
  for (int i = kModerate + thread; i < kSigmoids; i += threads) table[i] = any_sigmoid(gate(i));
}

// Sigmoids of eight gates from the table.
__device__ inline Float8 sigmoid8(const Bf16x8& g, const float* table) {
  constexpr std::uint32_t kPair = 0x00010001u;
  Float8 s;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // In each half, in bytes: eight a magnitude, four for the sign.
    const std::uint32_t inside =
        __viaddmin_s16x2_relu(g.w[i] & kMagnitudes, (0x10000u - kLowestGate) * kPair,
                              (kHighestGate - kLowestGate) * kPair);
    const std::uint32_t offsets = inside * 8 | (g.w[i] >> 13 & 4 * kPair);
    const std::uint32_t second = offsets >> 16, first = second * 0xFFFF0000u + offsets;
    const auto* bytes = reinterpret_cast<const char*>(table);
    s.v[2 * i] = *reinterpret_cast<const float*>(bytes + first);
    s.v[2 * i + 1] = *reinterpret_cast<const float*>(bytes + second);
  }
  return s;
}

// The FP32 products, from the gates' sigmoids.
__device__ inline Float8 swiglu8(const Bf16x8& g, const Bf16x8& u, Float8 a) {
#pragma unroll
  for (int c = 0; c < 8; ++c) a.v[c] = (value(g, c) * a.v[c]) * value(u, c);
  return a;
}

struct SwigluGradient {
  Bf16x8 gate, up;
};
// s: the gates' sigmoids.
__device__ inline SwigluGradient swiglu_gradient8(const Bf16x8& g8, const Bf16x8& u8,
                                                  const Bf16x8& d8, const Float8& s) {
  SwigluGradient out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float gate[2], up[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float g = value(g8, 2 * i + h), d = value(d8, 2 * i + h), sg = s.v[2 * i + h];
      gate[h] = ((d * value(u8, 2 * i + h)) * sg) * numerics::fma(g, 1.0f - sg, 1.0f);
      up[h] = d * (g * sg);
    }
    out.gate.w[i] = pack_bf16(gate[0], gate[1]);
    out.up.w[i] = pack_bf16(up[0], up[1]);
  }
  return out;
}

}  // namespace lockstep::ops::cuda

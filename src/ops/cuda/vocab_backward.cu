// The gradient of the logits: element by element, a row's constants in registers.
#include <cuda_bf16.h>

#include "ops/cuda/vocab.h"
#include "ops/cuda/vocab_row.cuh"

namespace lockstep::ops::cuda {
namespace {

using numerics::Bf16;

constexpr int kThreads = 256;
constexpr int kValues = 8;                              // a thread's at a time: 16 bytes of BF16
constexpr std::int64_t kPart = 4 * kThreads * kValues;  // tokens of a thread block

// p / total, rounded as IEEE division does it: with inverse = 1 / total rounded, two corrections of
// p * inverse by its exact remainder, as long as no term is subnormal.
__device__ inline float divide(float p, float total, float inverse) {
  if (p < 0x1p-90f) return p == 0.0f ? 0.0f : p / total;
  float q = p * inverse;
  q = numerics::fma(numerics::fma(-q, total, p), inverse, q);
  return numerics::fma(numerics::fma(-q, total, p), inverse, q);
}

// Bits of two BF16, the first in the low half.
__device__ inline std::uint32_t pack(float a, float b) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
  std::uint32_t bits;
  memcpy(&bits, &both, sizeof(bits));
  return bits;
}

struct Gradient {
  float inv_t, max, total, inverse, g;
  Cut cut;
  std::int64_t target;

  __device__ float at(float logit, std::int64_t v) const {
    const float z = logit * inv_t;
    if (!kept(z, v, cut)) return 0.0f;
    const float p = divide(numerics::exp2((z - max) * numerics::kLog2e), total, inverse);
    return (((v == target ? 1.0f : 0.0f) - p) * g) * inv_t;
  }
};

template <bool kWide>
__device__ void fill(Bf16* out, std::int64_t begin, std::int64_t end, std::uint16_t bits) {
  if (kWide) {
    const std::uint32_t two = bits | static_cast<std::uint32_t>(bits) << 16;
    for (std::int64_t v = begin + kValues * threadIdx.x; v < end; v += kValues * kThreads)
      *reinterpret_cast<uint4*>(out + v) = make_uint4(two, two, two, two);
  } else {
    for (std::int64_t v = begin + threadIdx.x; v < end; v += kThreads) out[v].bits = bits;
  }
}

// kWide: V is a multiple of 8 and both tensors are aligned.
template <bool kWide>
__global__ __launch_bounds__(kThreads) void backward_kernel(const float* logits, std::int64_t V,
                                                            int parts, const std::int32_t* targets,
                                                            const RowSampling* sampling,
                                                            const RowStats* stats, const float* g_R,
                                                            Bf16* d_logits) {
  const std::int64_t r = blockIdx.x / parts;
  const std::int64_t begin = blockIdx.x % parts * kPart;
  const std::int64_t end = begin + kPart < V ? begin + kPart : V;
  const float* row = logits + r * V;
  Bf16* out = d_logits + r * V;
  const RowStats s = stats[r];
  const float g = g_R[r];
  if (g == 0.0f || s.logprob == -kInfinity) return fill<kWide>(out, begin, end, 0);
  if (numerics::is_nan(s.logprob)) return fill<kWide>(out, begin, end, 0x7FFF);
  const Gradient d{inverse_temperature(sampling[r]), s.max,     s.total, 1.0f / s.total, g,
                   {s.cut_z, s.cut_index},           targets[r]};
  if (kWide) {
#pragma unroll 2
    for (std::int64_t v = begin + kValues * threadIdx.x; v < end; v += kValues * kThreads) {
      const float4 a = *reinterpret_cast<const float4*>(row + v),
                   b = *reinterpret_cast<const float4*>(row + v + 4);
      *reinterpret_cast<uint4*>(out + v) = make_uint4(
          pack(d.at(a.x, v), d.at(a.y, v + 1)), pack(d.at(a.z, v + 2), d.at(a.w, v + 3)),
          pack(d.at(b.x, v + 4), d.at(b.y, v + 5)), pack(d.at(b.z, v + 6), d.at(b.w, v + 7)));
    }
  } else {
    for (std::int64_t v = begin + threadIdx.x; v < end; v += kThreads)
      out[v] = numerics::to_bf16(d.at(row[v], v));
  }
}

bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

}  // namespace

void vocab_backward(const Context& ctx, const TensorView& logits_RV, const TensorView& targets_R,
                    const RowSampling* sampling, const RowStats* stats, const TensorView& g_R,
                    const TensorView& d_logits_RV) {
  const std::int64_t R = logits_RV.dim(0), V = logits_RV.dim(1);
  if (R == 0) return;
  const auto parts = static_cast<int>((V + kPart - 1) / kPart);
  const bool wide = V % kValues == 0 && aligned(logits_RV.data) && aligned(d_logits_RV.data);
  const auto run = wide ? backward_kernel<true> : backward_kernel<false>;
  run<<<static_cast<unsigned>(R * parts), kThreads, 0, stream_of(ctx)>>>(
      logits_RV.as<float>(), V, parts, targets_R.as<std::int32_t>(), sampling, stats,
      g_R.as<float>(), d_logits_RV.as<Bf16>());
  LOCKSTEP_CUDA_LAUNCHED("vocab_backward");
}

}  // namespace lockstep::ops::cuda

// Normal random values made on the GPU, for benches.
#pragma once

#include "numerics/formats.h"
#include "tensor/cuda_check.h"

namespace lockstep::bench {

__device__ inline std::uint32_t mix(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ x >> 16;
}
__device__ inline float normal_value(std::uint32_t seed, std::int64_t i) {
  const std::uint32_t a = mix(static_cast<std::uint32_t>(i) * 2u + mix(seed)),
                      b = mix(a + 0x9E3779B9u);
  const float u = (static_cast<float>(a >> 8) + 0.5f) * 0x1p-24f,
              v = static_cast<float>(b >> 8) * 0x1p-24f;
  return sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * v);
}
__device__ inline void put(numerics::Bf16* to, float x) { *to = numerics::to_bf16(x); }
__device__ inline void put(float* to, float x) { *to = x; }
__device__ inline void put(numerics::Fp8* to, float x) { *to = numerics::to_e4m3(x); }

// to[i] = offset + deviation * normal.
template <typename T>
__global__ void fill_kernel(T* to, std::int64_t n, std::uint32_t seed, float deviation,
                            float offset) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n;
       i += std::int64_t{gridDim.x} * blockDim.x)
    put(to + i, offset + deviation * normal_value(seed, i));
}
template <typename T>
void fill_normal(const tensor::Context& ctx, T* to, std::int64_t n, std::uint32_t seed,
                 float deviation = 1.0f, float offset = 0.0f) {
  fill_kernel<<<1056, 256, 0, tensor::stream_of(ctx)>>>(to, n, seed, deviation, offset);
  LOCKSTEP_CUDA_LAUNCHED("fill_normal");
}

}  // namespace lockstep::bench

// The scalar functions of numerics/ and Philox give the same bits on the device as on the host.
// Every 251st FP32 bit pattern is tried (17 million, all exponents, subnormals, infinities, NaNs);
// a NaN must be a NaN on both sides, its bits may differ. Exit code 0: equal; 1: different; 77: no
// GPU.
#include <cstdio>
#include <vector>

#include "base/philox.h"
#include "numerics/math.h"

namespace {

using namespace lockstep;

constexpr std::uint32_t kStep = 251;
constexpr std::uint32_t kCount = 0xFFFFFFFFu / kStep;

enum Function {
  kBf16,
  kE4m3,
  kE5m2,
  kExp,
  kExp2,
  kExp2Softmax,
  kLog,
  kSigmoid,
  kSilu,
  kScale,
  kScalePow2,
  kPhilox,
  kFunctions
};
const char* const kNames[] = {"to_bf16", "to_e4m3",      "to_e5m2",    "exp",
                              "exp2",    "exp2_softmax", "log",        "sigmoid",
                              "silu",    "scale",        "scale_pow2", "philox4x32"};

LOCKSTEP_HD std::uint32_t evaluate(int function, std::uint32_t i) {
  const std::uint32_t bits = i * kStep;
  const float x = numerics::bits_float(bits);
  switch (function) {
    case kBf16:
      return numerics::to_bf16(x).bits;
    case kE4m3:
      return numerics::to_e4m3(x) |
             (numerics::float_bits(numerics::e4m3_to_float(bits >> 24)) & 0xFFFFFF00u);
    case kE5m2:
      return numerics::to_e5m2(x) |
             (numerics::float_bits(numerics::e5m2_to_float(bits >> 24)) & 0xFFFFFF00u);
    case kExp:
      return numerics::float_bits(numerics::exp(x));
    case kExp2:
      return numerics::float_bits(numerics::exp2(x));
    case kExp2Softmax:
      return numerics::float_bits(numerics::exp2_softmax(x > 0.5f ? 0.5f : x));
    case kLog:
      return numerics::float_bits(numerics::log(x));
    case kSigmoid:
      return numerics::float_bits(numerics::sigmoid(x));
    case kSilu:
      return numerics::float_bits(numerics::silu(x));
    case kScale:
      return numerics::float_bits(numerics::quant_scale(x < 0 ? -x : x, false));
    case kScalePow2:
      return numerics::float_bits(numerics::quant_scale(x < 0 ? -x : x, true));
    default: {
      const base::PhiloxWords w =
          base::philox4x32(bits * 0x9E3779B97F4A7C15ull, i, ~static_cast<std::uint64_t>(bits));
      return w.word[0] ^ (w.word[1] * 3) ^ (w.word[2] * 5) ^ (w.word[3] * 7);
    }
  }
}

__global__ void evaluate_kernel(int function, std::uint32_t* out) {
  const std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < kCount) out[i] = evaluate(function, i);
}

bool is_float_result(int function) { return function >= kExp && function <= kScalePow2; }

bool is_nan_bits(std::uint32_t u) { return (u & 0x7FFFFFFFu) > 0x7F800000u; }

bool succeeded(cudaError_t error, const char* what) {
  if (error != cudaSuccess) std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  return error == cudaSuccess;
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no GPU here\n");
    return 77;
  }
  std::uint32_t* on_device = nullptr;
  if (!succeeded(cudaMalloc(&on_device, kCount * sizeof(std::uint32_t)), "cudaMalloc")) return 1;
  std::vector<std::uint32_t> got(kCount);
  bool equal = true;
  for (int function = 0; function < kFunctions; ++function) {
    evaluate_kernel<<<(kCount + 255) / 256, 256>>>(function, on_device);
    if (!succeeded(cudaGetLastError(), "launch") ||
        !succeeded(cudaMemcpy(got.data(), on_device, kCount * sizeof(std::uint32_t),
                              cudaMemcpyDeviceToHost),
                   "copy"))
      return 1;
    std::uint32_t different = 0, first = 0;
    for (std::uint32_t i = kCount; i-- > 0;) {
      const std::uint32_t want = evaluate(function, i);
      const bool same =
          want == got[i] || (is_float_result(function) && is_nan_bits(want) && is_nan_bits(got[i]));
      if (!same) ++different, first = i;
    }
    std::printf("%-12s %u of %u differ", kNames[function], different, kCount);
    if (different > 0)
      std::printf(", first at %08x: host %08x, device %08x", first * kStep,
                  evaluate(function, first), got[first]);
    std::printf("\n");
    equal = equal && different == 0;
  }
  cudaFree(on_device);
  return equal ? 0 : 1;
}

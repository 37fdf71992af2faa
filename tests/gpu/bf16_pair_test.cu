// The hardware's conversion of two FP32 values to BF16 against numerics::to_bf16, for every input.
#include "gpu/gpu_test.h"
#include "ops/cuda/rows.cuh"

namespace lockstep::ops::test {
namespace {

using Bf16PairGpu = GpuTest;

__global__ void count_differences(unsigned long long* different) {
  const std::uint64_t stride = std::uint64_t{gridDim.x} * blockDim.x;
  unsigned long long found = 0;
  for (std::uint64_t i = std::uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < 1ull << 32;
       i += stride) {
    const float low = numerics::bits_float(static_cast<std::uint32_t>(i));
    const float high = numerics::bits_float(~static_cast<std::uint32_t>(i));
    const std::uint32_t expected = static_cast<std::uint32_t>(numerics::to_bf16(high).bits) << 16 |
                                   numerics::to_bf16(low).bits;
    if (cuda::bf16_pair(low, high) != expected) ++found;
  }
  if (found != 0) atomicAdd(different, found);
}

TEST_F(Bf16PairGpu, EveryInput) {
  const TensorView different = on_gpu(empty(DType::kInt64, {1}));
  count_differences<<<132 * 8, 256, 0, tensor::stream_of(gpu)>>>(
      reinterpret_cast<unsigned long long*>(different.as<std::int64_t>()));
  LOCKSTEP_CUDA_LAUNCHED("count_differences");
  EXPECT_EQ(from_gpu(different).as<std::int64_t>()[0], 0);
}

}  // namespace
}  // namespace lockstep::ops::test

// What the launch plans of attention's forward and backward share.
#pragma once

#include "ops/attention_args.h"
#include "ops/cuda/tensor_map.h"
#include "tensor/cuda_check.h"

namespace lockstep::ops::cuda {

template <typename Kernel>
void allow_shared(Kernel kernel, int bytes) {
  tensor::check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
      "attention's shared memory");
}

inline unsigned grid_size(std::int64_t n) { return static_cast<unsigned>(n); }

// [rows, heads, width] BF16: boxes of 64 columns of one head in `box` rows, 128-byte swizzle.
inline CUtensorMap rows_map(const numerics::Bf16* data, std::int64_t width, std::int64_t heads,
                            std::int64_t rows, int box, const char* what) {
  return tensor_map(data, tensor::DType::kBf16,
                    {{width, 2, 64}, {heads, width * 2, 1}, {rows, heads * width * 2, box}},
                    CU_TENSOR_MAP_SWIZZLE_128B, what);
}

}  // namespace lockstep::ops::cuda

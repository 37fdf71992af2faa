#include "ops/cuda/tensor_map.h"

#include "tensor/cuda_check.h"

namespace lockstep::ops::cuda {
namespace {

using tensor::DType;
using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
  tensor::check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                      cudaEnableDefault, &found),
                     "cuTensorMapEncodeTiled");
  if (found != cudaDriverEntryPointSuccess || entry == nullptr)
    base::fail<base::SystemError>(
        "the GPU driver has no cuTensorMapEncodeTiled; it must support CUDA 12 or later");
  return reinterpret_cast<Encode>(entry);
}

CUtensorMapDataType map_type(DType dtype) {
  switch (dtype) {
    case DType::kE4m3:
    case DType::kE5m2:
      return CU_TENSOR_MAP_DATA_TYPE_UINT8;
    case DType::kBf16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DType::kFp32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    default:
      base::fail<base::ContractError>("tensor_map of {}", tensor::dtype_name(dtype));
  }
}

}  // namespace

CUtensorMap tensor_map(const void* data, DType dtype, std::initializer_list<MapDim> dims,
                       CUtensorMapSwizzle swizzle, const char* what) {
  static const Encode encode = find_encode();
  constexpr std::size_t kMaxRank = 5;
  LOCKSTEP_CHECK(dims.size() >= 1 && dims.size() <= kMaxRank, "{}: {} dimensions", what,
                 dims.size());
  cuuint64_t sizes[kMaxRank] = {}, strides[kMaxRank] = {};
  cuuint32_t box[kMaxRank] = {}, step[kMaxRank] = {};
  cuuint32_t rank = 0;
  for (const MapDim& dim : dims) {
    sizes[rank] = static_cast<cuuint64_t>(dim.size);
    if (rank > 0) strides[rank - 1] = static_cast<cuuint64_t>(dim.stride);
    box[rank] = static_cast<cuuint32_t>(dim.box);
    step[rank] = 1;
    ++rank;
  }
  CUtensorMap map;
  const CUresult status =
      encode(&map, map_type(dtype), rank, const_cast<void*>(data), sizes, strides, box, step,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  LOCKSTEP_CHECK(status == CUDA_SUCCESS,
                 "{}: no tensor map (error {}) for {} at {}, {} dimensions, innermost {} x {}; the "
                 "address and all strides must be multiples of 16 bytes",
                 what, static_cast<int>(status), tensor::dtype_name(dtype), data, rank, sizes[0],
                 sizes[1]);
  return map;
}

}  // namespace lockstep::ops::cuda

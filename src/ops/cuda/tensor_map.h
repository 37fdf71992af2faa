// TMA maps of tensors in device memory. A map is passed by value as a `const __grid_constant__
// CUtensorMap` kernel parameter.
#pragma once

#include <cuda.h>

#include <initializer_list>

#include "tensor/tensor.h"

namespace lockstep::ops::cuda {

// Innermost dimension first, up to five; sizes at least 1. `stride` of a dimension in bytes (that
// of the innermost is the element's size, whatever is given here).
struct MapDim {
  std::int64_t size;
  std::int64_t stride;
  int box;  // elements that one load or store moves, at most 256
};

// FP8 codes are bytes to the copy engine. `data` is 16-byte aligned, strides are multiples of 16,
// the innermost box is at most as wide as the swizzle. ContractError that names `what` otherwise.
CUtensorMap tensor_map(const void* data, tensor::DType dtype, std::initializer_list<MapDim> dims,
                       CUtensorMapSwizzle swizzle, const char* what);

}  // namespace lockstep::ops::cuda

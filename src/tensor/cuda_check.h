// Errors of CUDA calls. Only files that are compiled in a CUDA build include this.
#pragma once

#include <cuda_runtime_api.h>

#include "tensor/tensor.h"

namespace lockstep::tensor {

// SystemError that names the call and what to do; nothing for cudaSuccess.
void check_cuda(cudaError_t status, const char* what);

inline cudaStream_t stream_of(const Context& ctx) { return static_cast<cudaStream_t>(ctx.stream); }

}  // namespace lockstep::tensor

// After a kernel launch.
#define LOCKSTEP_CUDA_LAUNCHED(name) ::lockstep::tensor::check_cuda(cudaGetLastError(), name)

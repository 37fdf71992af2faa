// How an op reaches its CUDA implementation, lockstep::ops::cuda::<op>, after its arguments were
// checked: LOCKSTEP_CUDA_CALL returns from the op where the context is a GPU's. Every pointer that
// an op takes (tensors, QuantStats, RowSampling, RowStats) is memory of the context's device;
// values in device memory are not checked, because that would stop the stream.
#pragma once

#include "tensor/op_profile.h"

#ifdef LOCKSTEP_HAVE_CUDA
#define LOCKSTEP_CUDA_CALL(ctx, function, ...)                 \
  if ((ctx).device == ::lockstep::tensor::Device::kCuda) {     \
    const ::lockstep::tensor::OpTimer timer((ctx), #function); \
    return cuda::function(__VA_ARGS__);                        \
  }                                                            \
  static_assert(true)
#else
#define LOCKSTEP_CUDA_CALL(ctx, function, ...)                     \
  LOCKSTEP_CHECK((ctx).device == ::lockstep::tensor::Device::kCpu, \
                 "{}: this build has no CUDA backend", #function)
#endif

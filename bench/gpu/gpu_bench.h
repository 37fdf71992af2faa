// Timing of kernels: each sample is `inner` launches between two events, after warm-up; median,
// 10th and 90th percentile over the samples. Input sets rotate, so that nothing sits in the L2
// cache.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <vector>

#include "tensor/cuda_check.h"

namespace lockstep::bench {

struct Timing {
  double median = 0, p10 = 0, p90 = 0;  // seconds a launch
};

// run(i): launch number i (for the choice of an input set) on the context's stream.
inline Timing time_kernel(const tensor::Context& ctx, const std::function<void(int)>& run,
                          int samples = 25, int inner = 4) {
  const cudaStream_t stream = tensor::stream_of(ctx);
  cudaEvent_t begin = nullptr, end = nullptr;
  tensor::check_cuda(cudaEventCreate(&begin), "event");
  tensor::check_cuda(cudaEventCreate(&end), "event");
  int launch = 0;
  for (int i = 0; i < 2 * inner; ++i) run(launch++);
  std::vector<double> seconds;
  for (int s = 0; s < samples; ++s) {
    tensor::check_cuda(cudaEventRecord(begin, stream), "event");
    for (int i = 0; i < inner; ++i) run(launch++);
    tensor::check_cuda(cudaEventRecord(end, stream), "event");
    tensor::check_cuda(cudaEventSynchronize(end), "a kernel that is timed");
    float ms = 0;
    tensor::check_cuda(cudaEventElapsedTime(&ms, begin, end), "event");
    seconds.push_back(ms * 1e-3 / inner);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(seconds.begin(), seconds.end());
  const auto at = [&](double q) {
    return seconds[static_cast<std::size_t>(q * (samples - 1) + 0.5)];
  };
  return {at(0.5), at(0.1), at(0.9)};
}

}  // namespace lockstep::bench

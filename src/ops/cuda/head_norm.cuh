// The arguments of the kernels for heads (ops/norm.h), and what those of any head width share.
#pragma once

#include "ops/cuda/norm.cuh"

namespace lockstep::ops::cuda {

// Pointers to heads are to the first head's column of token 0; strides are from token to token.
struct Heads {
  std::int64_t T;
  int H, K;
  const Bf16* x;
  std::int64_t x_stride;
  const Bf16* d_out;  // backward: [T, H, K]
  Bf16* out;          // forward: the result; backward: d_x
  std::int64_t out_stride;
  const Bf16* w;  // null: no norm
  const std::int32_t* positions;
  const float* cos;  // null: no rotation
  const float* sin;
  std::int64_t P;
  float* rstd;
  float eps;
};

__device__ inline std::int64_t table_row(const Heads& a, std::int64_t t) {
  return std::int64_t{clamp_index(a.positions[t], a.P)} * (a.K / 2);
}

// Heads of up to 256 in 16-byte chunks. `turn` 1: norm and rotation; -1: the rotation's transpose.
void launch_head_chunks(const Heads& a, float turn, cudaStream_t stream);
bool head_in_chunks(const Heads& a);

// d_x and the blocks' shares of d_w, [ceil(T / 128), K]: of heads with a norm, in chunks, K a power
// of two from 16 to 256.
void launch_head_backward(const Heads& a, float* partial_BK, cudaStream_t stream);

// Any head width and alignment. partial_BK is null without a norm.
void launch_head_any(const Heads& a, cudaStream_t stream);
void launch_head_backward_any(const Heads& a, float* partial_BK, cudaStream_t stream);

}  // namespace lockstep::ops::cuda

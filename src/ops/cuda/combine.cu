#include "ops/cuda/permute.h"
#include "ops/cuda/rows.cuh"

namespace lockstep::ops::cuda {
namespace {

constexpr int kSlots = 8;  // rows in flight

// out[t] = bf16(acc): acc = 0; + first[t]; each slot's row; + last[t]. Rows are weighted by fma or
// just added.
struct SumRows {
  std::int64_t T, C, D, M;
  const Bf16* rows;
  const float* weights;
  const std::int32_t* row;
  const Bf16* first;
  const Bf16* last;
  Bf16* out;
};

__device__ void add_chunk(const uint4& chunk, float (&acc)[8]) {
  float v[8];
  unpack(chunk, v);
#pragma unroll
  for (int k = 0; k < 8; ++k) acc[k] = acc[k] + v[k];
}

// A thread a chunk of a token.
template <bool kWeighted>
__global__ void __launch_bounds__(256) sum_chunks_kernel(SumRows a) {
  const std::int64_t chunks = a.D / 8;
  const std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= a.T * chunks) return;
  const std::int64_t t = i / chunks, q = i % chunks;
  const auto* rows = reinterpret_cast<const uint4*>(a.rows) + q;
  float acc[8] = {};
  uint4 last;
  if (a.last != nullptr) last = __ldg(reinterpret_cast<const uint4*>(a.last) + i);
  if (a.first != nullptr) add_chunk(__ldg(reinterpret_cast<const uint4*>(a.first) + i), acc);
  for (std::int64_t c0 = 0; c0 < a.C; c0 += kSlots) {
    uint4 chunk[kSlots];
    float weight[kSlots];
#pragma unroll
    for (int c = 0; c < kSlots; ++c)
      if (c0 + c < a.C) {
        const std::int64_t slot = t * a.C + c0 + c;
        chunk[c] = __ldg(rows + clamp_index(__ldg(a.row + slot), a.M) * chunks);
        if (kWeighted) weight[c] = __ldg(a.weights + slot);
      }
#pragma unroll
    for (int c = 0; c < kSlots; ++c)
      if (c0 + c < a.C) {
        if constexpr (kWeighted) {
          float v[8];
          unpack(chunk[c], v);
#pragma unroll
          for (int k = 0; k < 8; ++k) acc[k] = numerics::fma(weight[c], v[k], acc[k]);
        } else {
          add_chunk(chunk[c], acc);
        }
      }
  }
  if (a.last != nullptr) add_chunk(last, acc);
  reinterpret_cast<uint4*>(a.out)[i] = pack(acc);
}

template <bool kWeighted>
__global__ void sum_values_kernel(SumRows a) {
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < a.T * a.D;
       i += stride) {
    const std::int64_t t = i / a.D, d = i % a.D;
    float acc = 0.0f;
    if (a.first != nullptr) acc = acc + numerics::to_float(a.first[i]);
    for (std::int64_t c = 0; c < a.C; ++c) {
      const std::int64_t slot = t * a.C + c;
      const float v = numerics::to_float(a.rows[clamp_index(a.row[slot], a.M) * a.D + d]);
      acc = kWeighted ? numerics::fma(a.weights[slot], v, acc) : acc + v;
    }
    if (a.last != nullptr) acc = acc + numerics::to_float(a.last[i]);
    a.out[i] = numerics::to_bf16(acc);
  }
}

template <bool kWeighted>
void launch_sum(const Context& ctx, const SumRows& a, const char* name) {
  if (a.T == 0 || a.D == 0) return;
  const cudaStream_t stream = stream_of(ctx);
  if (in_chunks(a.D, a.rows, a.first, a.last, a.out)) {
    sum_chunks_kernel<kWeighted><<<blocks_for(a.T * (a.D / 8), 256), 256, 0, stream>>>(a);
  } else {
    const Grid grid = elementwise_grid(a.T * a.D);
    sum_values_kernel<kWeighted><<<grid.blocks, grid.threads, 0, stream>>>(a);
  }
  LOCKSTEP_CUDA_LAUNCHED(name);
}

struct CombineBackward {
  std::int64_t T, C, D, M;
  const Bf16* dy;
  const Bf16* o;
  const float* weights;
  const std::int32_t* row;
  Bf16* d_o;
  float* d_weights;
};

constexpr int kWarps = 8;
constexpr int kChunks = 8;  // of each input in flight

// A warp a slot; neighbours share dy[t].
__global__ void __launch_bounds__(32 * kWarps) combine_backward_kernel(CombineBackward a) {
  const std::int64_t slot = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (slot >= a.T * a.C) return;
  const int lane = static_cast<int>(threadIdx.x % 32), chunks = static_cast<int>(a.D / 8);
  const float w = __ldg(a.weights + slot);
  const std::int64_t r = clamp_index(__ldg(a.row + slot), a.M);
  const auto* dy = reinterpret_cast<const uint4*>(a.dy) + slot / a.C * chunks;
  const auto* o = reinterpret_cast<const uint4*>(a.o) + r * chunks;
  auto* d_o = reinterpret_cast<uint4*>(a.d_o) + r * chunks;
  float sum = 0.0f;
  for (int q0 = lane; q0 < chunks; q0 += 32 * kChunks) {
    uint4 g_chunk[kChunks], x_chunk[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      if (q0 + 32 * i < chunks) {
        g_chunk[i] = __ldg(dy + q0 + 32 * i);
        x_chunk[i] = __ldg(o + q0 + 32 * i);
      }
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      if (q0 + 32 * i < chunks) {
        float g[8], x[8];
        unpack(g_chunk[i], g);
        unpack(x_chunk[i], x);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          sum = numerics::fma(g[k], x[k], sum);
          g[k] = w * g[k];
        }
        d_o[q0 + 32 * i] = pack(g);
      }
  }
  sum = butterfly_sum(sum);
  if (lane == 0) a.d_weights[slot] = sum;
}

__global__ void combine_backward_any_kernel(CombineBackward a) {
  const std::int64_t slot = blockIdx.x, r = clamp_index(a.row[slot], a.M);
  const Bf16* g = a.dy + slot / a.C * a.D;
  const Bf16* x = a.o + r * a.D;
  const float w = a.weights[slot];
  float sum = 0.0f;
  for (std::int64_t d0 = threadIdx.x * 8; d0 < a.D; d0 += 256)
    for (std::int64_t d = d0; d < min(d0 + 8, a.D); ++d) {
      sum = numerics::fma(numerics::to_float(g[d]), numerics::to_float(x[d]), sum);
      a.d_o[r * a.D + d] = numerics::to_bf16(w * numerics::to_float(g[d]));
    }
  sum = butterfly_sum(sum);
  if (threadIdx.x == 0) a.d_weights[slot] = sum;
}

}  // namespace

void combine(const Context& ctx, const TensorView& o_MD, const TensorView& weights_TC,
             const TensorView& row_TC, const TensorView& shared_TD, const TensorView& y_TD) {
  launch_sum<true>(ctx,
                   {row_TC.dim(0), row_TC.dim(1), o_MD.dim(1), o_MD.dim(0), o_MD.as<Bf16>(),
                    weights_TC.as<float>(), row_TC.as<std::int32_t>(), nullptr,
                    shared_TD ? shared_TD.as<Bf16>() : nullptr, y_TD.as<Bf16>()},
                   "combine");
}

void permute_backward(const Context& ctx, const TensorView& d_x_MD, const TensorView& row_TC,
                      const TensorView& first_TD, const TensorView& last_TD,
                      const TensorView& d_h_TD) {
  launch_sum<false>(ctx,
                    {row_TC.dim(0), row_TC.dim(1), d_x_MD.dim(1), d_x_MD.dim(0), d_x_MD.as<Bf16>(),
                     nullptr, row_TC.as<std::int32_t>(), first_TD ? first_TD.as<Bf16>() : nullptr,
                     last_TD ? last_TD.as<Bf16>() : nullptr, d_h_TD.as<Bf16>()},
                    "permute_backward");
}

void combine_backward(const Context& ctx, const TensorView& dy_TD, const TensorView& o_MD,
                      const TensorView& weights_TC, const TensorView& row_TC,
                      const TensorView& d_o_MD, const TensorView& d_weights_TC) {
  const CombineBackward a{
      dy_TD.dim(0),      row_TC.dim(1),           dy_TD.dim(1),           o_MD.dim(0),
      dy_TD.as<Bf16>(),  o_MD.as<Bf16>(),         weights_TC.as<float>(), row_TC.as<std::int32_t>(),
      d_o_MD.as<Bf16>(), d_weights_TC.as<float>()};
  const std::int64_t slots = a.T * a.C;
  if (slots == 0) return;
  if (in_chunks(a.D, a.dy, a.o, a.d_o))
    combine_backward_kernel<<<blocks_for(slots, kWarps), 32 * kWarps, 0, stream_of(ctx)>>>(a);
  else
    combine_backward_any_kernel<<<static_cast<unsigned>(slots), 32, 0, stream_of(ctx)>>>(a);
  LOCKSTEP_CUDA_LAUNCHED("combine_backward");
}

}  // namespace lockstep::ops::cuda

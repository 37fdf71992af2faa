// AdamW with the weight's codes. A CTA walks over blocks of 128 x 128. It first steps the block, a
// warp row by row with four neighbouring values a thread, so that every access is a whole line, and
// leaves the new BF16 values in shared memory; then each thread takes its 8 x 8 values from there
// and quantizes them, while the next block's first rows are under way.
#include <algorithm>

#include "ops/cuda/adamw_quantize.h"
#include "ops/cuda/adamw_values.cuh"
#include "ops/cuda/quantize_launch.cuh"
#include "ops/cuda/quantize_weight_block.cuh"

namespace lockstep::ops::cuda {
namespace {

constexpr int kCtas = 2;   // a multiprocessor's
constexpr int kAhead = 2;  // rows that a warp has under way, as many as registers hold
constexpr int kWarps = kBlockThreads / 32;
constexpr int kWarpRows = kQuantBlock / kWarps;
constexpr int kTileBytes = kQuantBlock * kQuantBlock * 2;

template <typename M, typename V>
struct StepState {
  const float* grad;
  float* master;
  M* m;
  V* v;
  Bf16* w;
  AdamwFactors factors;
};

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};
template <typename M, typename V>
struct StepRow {
  Four<float> grad, master;
  Four<M> m;
  Four<V> v;
};

// Four values, of which n are in the matrix. kVector: all of them are.
template <bool kVector, typename T>
__device__ void load4(const T* from, int n, Four<T>& to) {
  if constexpr (kVector) {
    to = *reinterpret_cast<const Four<T>*>(from);
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) to.x[c] = c < n ? from[c] : T{};
  }
}
template <bool kVector, typename T>
__device__ void store4(T* to, int n, const Four<T>& from) {
  if constexpr (kVector) {
    *reinterpret_cast<Four<T>*>(to) = from;
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (c < n) to[c] = from.x[c];
  }
}

template <bool kVector, typename M, typename V>
__device__ void load_row(const StepState<M, V>& s, std::int64_t at, int n, StepRow<M, V>& to) {
  load4<kVector>(s.grad + at, n, to.grad);
  load4<kVector>(s.master + at, n, to.master);
  load4<kVector>(s.m + at, n, to.m);
  load4<kVector>(s.v + at, n, to.v);
}

// The new BF16 values.
template <bool kVector, typename M, typename V>
__device__ uint2 step_row(const StepState<M, V>& s, std::int64_t at, int n, StepRow<M, V>& x) {
  Four<Bf16> w;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    adamw_step(x.grad.x[c], s.factors, x.master.x[c], x.m.x[c], x.v.x[c]);
    w.x[c] = kVector || c < n ? numerics::to_bf16(x.master.x[c]) : Bf16{};
  }
  store4<kVector>(s.master + at, n, x.master);
  store4<kVector>(s.m + at, n, x.m);
  store4<kVector>(s.v + at, n, x.v);
  store4<kVector>(s.w + at, n, w);
  return {w.x[0].bits | static_cast<unsigned>(w.x[1].bits) << 16,
          w.x[2].bits | static_cast<unsigned>(w.x[3].bits) << 16};
}

// Where this thread's values of a block begin, and how many of its warp's rows are in the matrix.
struct Part {
  std::int64_t at;
  int rows, n;
};
__device__ Part part_of(const WeightBlocks& plan, const WeightBlock& b) {
  const int lane = static_cast<int>(threadIdx.x) % 32,
            row = static_cast<int>(threadIdx.x) / 32 * kWarpRows;
  const int n = b.columns - lane * 4;
  return {(b.e * plan.N + b.nb * kQuantBlock + row) * plan.K + b.kb * kQuantBlock + lane * 4,
          n > 0 ? b.rows - row : 0, n};
}

// Steps a block; its new values, zeros outside the matrix, in `tile`, 128 to a row. `ring` holds
// its first rows, and the next block's in the end.
template <bool kVector, typename M, typename V>
__device__ void step_block(const StepState<M, V>& s, const WeightBlocks& plan, Part part,
                           const Part& next, StepRow<M, V> (&ring)[kAhead], uint2* tile) {
  constexpr int kRing = kAhead;
  tile += threadIdx.x / 32 * kWarpRows * 32 + threadIdx.x % 32;
#pragma unroll 1
  for (int first = 0; first < kWarpRows; first += kRing) {
    const bool last = first + kRing == kWarpRows;
    const int rows = last ? next.rows : part.rows - first - kRing, n = last ? next.n : part.n;
    std::int64_t from = last ? next.at : part.at + kRing * plan.K;
#pragma unroll
    for (int k = 0; k < kRing; ++k, part.at += plan.K, from += plan.K, tile += 32) {
      uint2 w{};
      if (first + k < part.rows) w = step_row<kVector>(s, part.at, part.n, ring[k]);
      *tile = w;
      if (k < rows) load_row<kVector>(s, from, n, ring[k]);
    }
  }
}

template <typename M, typename V, bool kVector>
__global__ void __launch_bounds__(kBlockThreads, kCtas)
    adamw_blocks(const StepState<M, V> state, const WeightBlocks plan) {
  extern __shared__ uint4 tile[];
  __shared__ BlockMemory memory;
  ThreadStats stats;
  const int tc = static_cast<int>(threadIdx.x) % 16, tr = static_cast<int>(threadIdx.x) / 16;
  constexpr int kRing = kAhead;
  StepRow<M, V> ring[kRing];
  // The grid has no more CTAs than there are blocks.
  Part part = part_of(plan, weight_block(plan, blockIdx.x));
#pragma unroll
  for (int k = 0; k < kRing; ++k)
    if (k < part.rows) load_row<kVector>(state, part.at + k * plan.K, part.n, ring[k]);
  int turn = 0;
  for (std::int64_t index = blockIdx.x; index < plan.blocks; index += gridDim.x, turn ^= 1) {
    Part next{};
    if (index + gridDim.x < plan.blocks)
      next = part_of(plan, weight_block(plan, index + gridDim.x));
    step_block<kVector>(state, plan, part, next, ring, reinterpret_cast<uint2*>(tile));
    part = next;
    __syncthreads();
    Bf16x8 x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = shared8(&tile[(tr * 8 + i) * 16 + tc]);
    quantize_weight_block<kVector>(plan, weight_block(plan, index), x, turn, memory, stats);
  }
  if (plan.stats != nullptr) flush_stats(stats, plan.stats);
}

struct Tensors {
  const TensorView &grad, &master, &m, &v, &w;
};

template <typename M, typename V>
void launch(const Context& ctx, const Tensors& t, const AdamwFactors& factors,
            const WeightBlocks& plan, bool vector) {
  const StepState<M, V> state{t.grad.as<float>(), t.master.as<float>(), t.m.as<M>(),
                              t.v.as<V>(),        t.w.as<Bf16>(),       factors};
  const auto grid = static_cast<unsigned>(
      std::min<std::int64_t>(plan.blocks, std::int64_t{kMultiprocessors} * kCtas));
  const auto kernel = vector ? adamw_blocks<M, V, true> : adamw_blocks<M, V, false>;
  allow_shared_memory(kernel, kTileBytes);
  kernel<<<grid, kBlockThreads, kTileBytes, stream_of(ctx)>>>(state, plan);
  LOCKSTEP_CUDA_LAUNCHED("adamw_quantize");
}

}  // namespace

void adamw_quantize(const Context& ctx, const TensorView& grad, const AdamwFactors& factors,
                    const TensorView& master, const TensorView& m, const TensorView& v,
                    const TensorView& w, bool pow2, const Fp8Weight& out, const Fp8Weight& out_t,
                    QuantStats* stats) {
  const std::int64_t N = w.dim(1), K = w.dim(2);
  const bool transpose = static_cast<bool>(out_t.codes_ENK);
  WeightBlocks plan{N, K};
  plan.row_blocks = (N + kQuantBlock - 1) / kQuantBlock;
  plan.column_blocks = (K + kQuantBlock - 1) / kQuantBlock;
  plan.blocks = w.dim(0) * plan.row_blocks * plan.column_blocks;
  plan.pow2 = pow2, plan.stats = stats;
  plan.codes = out.codes_ENK.fp8(), plan.scales = out.scales.as<float>();
  plan.codes_t = transpose ? out_t.codes_ENK.fp8() : nullptr;
  plan.scales_t = transpose ? out_t.scales.as<float>() : nullptr;
  if (plan.blocks == 0) return;
  bool vector = K % 8 == 0 && aligned16(plan.codes) &&
                (!transpose || (N % 16 == 0 && aligned16(plan.codes_t)));
  for (const TensorView* t : {&grad, &master, &m, &v, &w}) vector = vector && aligned16(t->data);
  const bool m_short = m.dtype == tensor::DType::kBf16, v_short = v.dtype == tensor::DType::kBf16;
  const auto run = m_short ? (v_short ? launch<Bf16, Bf16> : launch<Bf16, float>)
                           : (v_short ? launch<float, Bf16> : launch<float, float>);
  run(ctx, {grad, master, m, v, w}, factors, plan, vector);
}

}  // namespace lockstep::ops::cuda

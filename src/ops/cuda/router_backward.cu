#include "ops/cuda/router.cuh"

namespace lockstep::ops::cuda {
namespace {

constexpr int kTokenBlock = 128;  // docs/numerics.md, section 9

struct RouterBackward {
  std::int64_t T;
  int E;
  RouterOptions options;
  const float* logits;
  const std::int32_t* experts;
  const float* d_weights;
  const float* d_score;
  float* d_logits;
};

// Score gradient from the load-balancing loss alone.
template <int kSlots>
__device__ void balance_part(const RouterBackward& a, const float (&s)[kSlots],
                             float (&ds)[kSlots]) {
  const int lane = threadIdx.x % 32, E = a.E;
#pragma unroll
  for (int i = 0; i < kSlots; ++i)
    ds[i] = a.d_score != nullptr && lane + 32 * i < E ? __ldg(a.d_score + lane + 32 * i) : 0.0f;
  if (a.options.score != RouterScore::kSigmoid || a.d_score == nullptr) return;
  const float sum = padded_sum(s, E);
  float q[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) q[i] = i * 32 < E ? s[i] / sum : 0.0f;
  const float dot = padded_dot(ds, q, E);
#pragma unroll
  for (int i = 0; i < kSlots; ++i)
    if (lane + 32 * i < E) ds[i] = (ds[i] - dot) / sum;
}

// A warp a token.
template <int kSlots>
__global__ void __launch_bounds__(32 * kRouterWarps) router_backward_kernel(RouterBackward a) {
  const int lane = threadIdx.x % 32, E = a.E, C = a.options.top_k;
  const std::int64_t t = std::int64_t{blockIdx.x} * kRouterWarps + threadIdx.x / 32;
  if (t >= a.T) return;
  const std::int32_t* experts = a.experts + t * C;
  const float* d_weights = a.d_weights + t * C;
  float s[kSlots], ds[kSlots];
  token_scores(a.logits + t * E, E, a.options.score, s);
  balance_part(a, s, ds);

  const auto chosen_score = [&](int e) {
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
      if (lane + 32 * i == e) score = s[i];
    return __shfl_sync(kFullWarp, score, e % 32);
  };
  float divisor = 0.0f, dot = 0.0f;
  if (a.options.normalize) {
    for (int c = 0; c < C; ++c) divisor = divisor + chosen_score(clamp_index(experts[c], E));
    divisor = divisor + divisor_floor(a.options.score);
    for (int c = 0; c < C; ++c)
      dot = numerics::fma(d_weights[c] * a.options.scaling,
                          chosen_score(clamp_index(experts[c], E)) / divisor, dot);
  }
  for (int c = 0; c < C; ++c) {
    const int e = clamp_index(experts[c], E);
    const float b = d_weights[c] * a.options.scaling;
    const float slope = a.options.normalize ? (b - dot) / divisor : b;
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
      if (lane + 32 * i == e) ds[i] = ds[i] + slope;
  }

  float* d_logits = a.d_logits + t * E;
  const bool sigmoid = a.options.score == RouterScore::kSigmoid;
  const float mean = sigmoid ? 0.0f : padded_dot(ds, s, E);
#pragma unroll
  for (int i = 0; i < kSlots; ++i)
    if (lane + 32 * i < E)
      d_logits[lane + 32 * i] = sigmoid ? ds[i] * (s[i] * (1.0f - s[i])) : s[i] * (ds[i] - mean);
}

// The tile of tokens whose scores are in shared memory at a time, and the threads.
constexpr int score_tile(int slots) { return slots <= 8 ? 32 : 8; }

// A block of 128 tokens: a warp a token puts the scores of a tile into shared memory, then a thread
// an expert adds them in order.
template <int kSlots>
__global__ void __launch_bounds__(32 * score_tile(kSlots))
    score_block_kernel(const float* logits, std::int64_t T, int E, RouterScore kind,
                       double* block_sums) {
  extern __shared__ float scores[];  // [tile][E]
  constexpr int kTile = score_tile(kSlots), kThreads = 32 * kTile;
  constexpr int kPerThread = (kSlots * 32 + kThreads - 1) / kThreads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const std::int64_t begin = std::int64_t{blockIdx.x} * kTokenBlock;
  const std::int64_t end = min(begin + kTokenBlock, T);
  double acc[kPerThread] = {};
  for (std::int64_t t0 = begin; t0 < end; t0 += kTile) {
    const int tokens = static_cast<int>(min(std::int64_t{kTile}, end - t0));
    if (warp < tokens) {
      float s[kSlots];
      token_scores(logits + (t0 + warp) * E, E, kind, s);
      balance_scores(s, E, kind);
#pragma unroll
      for (int k = 0; k < kSlots; ++k)
        if (lane + 32 * k < E) scores[warp * E + lane + 32 * k] = s[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int e = static_cast<int>(threadIdx.x) + kThreads * k;
      if (e < E)
#pragma unroll 16
        for (int i = 0; i < tokens; ++i) acc[k] = acc[k] + static_cast<double>(scores[i * E + e]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int e = static_cast<int>(threadIdx.x) + kThreads * k;
    if (e < E) block_sums[std::int64_t{blockIdx.x} * E + e] = acc[k];
  }
}

__global__ void add_score_blocks_kernel(const double* block_sums, std::int64_t blocks, int E,
                                        double* sum) {
  const int e = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (e >= E) return;
  double total = 0.0;
#pragma unroll 16
  for (std::int64_t b = 0; b < blocks; ++b) total = total + __ldg(block_sums + b * E + e);
  sum[e] = total;
}

// One block. The slopes side by side, their products with the sums added by one thread in order.
__global__ void balance_gradient_kernel(const std::int32_t* offsets, const double* sum, int E,
                                        BalanceFactors f, float* d_score, double* value) {
  extern __shared__ double products[];
  const double C = static_cast<double>(f.top_k), T = static_cast<double>(f.tokens);
  for (int e = static_cast<int>(threadIdx.x); e < E; e += static_cast<int>(blockDim.x)) {
    const double count = static_cast<double>(offsets[e + 1] - offsets[e]);
    const double slope = f.coefficient * f.weight * static_cast<double>(E) * count / (C * T * T);
    d_score[e] = static_cast<float>(slope);
    products[e] = slope * sum[e];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = *value;
#pragma unroll 16
  for (int e = 0; e < E; ++e) total = total + products[e];
  *value = total;
}

}  // namespace

void router_backward(const Context& ctx, const TensorView& logits_TE, const TensorView& experts_TC,
                     const TensorView& d_weights_TC, const TensorView& d_score_E,
                     const RouterOptions& options, const TensorView& d_logits_TE) {
  const RouterBackward a{logits_TE.dim(0),
                         static_cast<int>(logits_TE.dim(1)),
                         options,
                         logits_TE.as<float>(),
                         experts_TC.as<std::int32_t>(),
                         d_weights_TC.as<float>(),
                         d_score_E ? d_score_E.as<float>() : nullptr,
                         d_logits_TE.as<float>()};
  if (a.T == 0) return;
  with_slots(a.E, [&](auto slots) {
    router_backward_kernel<slots()>
        <<<blocks_for(a.T, kRouterWarps), 32 * kRouterWarps, 0, stream_of(ctx)>>>(a);
  });
  LOCKSTEP_CUDA_LAUNCHED("router_backward");
}

void router_mean_scores(const Context& ctx, const TensorView& logits_TE,
                        const RouterOptions& options, const TensorView& sum_E) {
  const std::int64_t T = logits_TE.dim(0), E = logits_TE.dim(1);
  const cudaStream_t stream = stream_of(ctx);
  const tensor::ArenaScope scope(*ctx.workspace);
  const std::int64_t blocks = blocks_for(T, kTokenBlock);
  double* block_sums = ctx.workspace->take(tensor::DType::kFp64, {blocks, E}).as<double>();
  if (blocks > 0) {
    with_slots(E, [&](auto slots) {
      const std::size_t shared = static_cast<std::size_t>(E) * score_tile(slots()) * 4;
      score_block_kernel<slots()>
          <<<static_cast<unsigned>(blocks), 32 * score_tile(slots()), shared, stream>>>(
              logits_TE.as<float>(), T, static_cast<int>(E), options.score, block_sums);
    });
    LOCKSTEP_CUDA_LAUNCHED("router_mean_scores");
  }
  add_score_blocks_kernel<<<blocks_for(E, 32), 32, 0, stream>>>(
      block_sums, blocks, static_cast<int>(E), sum_E.as<double>());
  LOCKSTEP_CUDA_LAUNCHED("router_mean_scores: the sum of the blocks");
}

void balance_gradient(const Context& ctx, const TensorView& offsets_E1, const TensorView& sum_E,
                      const BalanceFactors& factors, const TensorView& d_score_E,
                      const TensorView& value) {
  const int E = static_cast<int>(sum_E.dim(0));
  balance_gradient_kernel<<<1, 256, static_cast<std::size_t>(E) * sizeof(double), stream_of(ctx)>>>(
      offsets_E1.as<std::int32_t>(), sum_E.as<double>(), E, factors, d_score_E.as<float>(),
      value.as<double>());
  LOCKSTEP_CUDA_LAUNCHED("balance_gradient");
}

}  // namespace lockstep::ops::cuda

// Log-probabilities and sampling in four launches: the pass over the logits, the cuts of rows that
// filter, the pass over what these keep, and the end of each row. Where no row filters, the second
// and third return at once.
#include "ops/cuda/vocab.h"
#include "ops/cuda/vocab_blocks.cuh"
#include "ops/cuda/vocab_filter.cuh"
#include "tensor/device.h"

namespace lockstep::ops::cuda {
namespace {

constexpr int kFinishThreads = 256;
constexpr int kTile = 2048;  // blocks whose terms are in shared memory, a multiple of 32
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kNoTerm = -1.0f;  // in place of a weight: the block has no kept token

// Addends of the strided sums over blocks.
struct Terms {
  float s[kTile], w[kTile], e[kTile];
};

__device__ float row_max(const float* m, int blocks, float* of_warp) {
  float max = -kInfinity;
  for (int b = static_cast<int>(threadIdx.x); b < blocks; b += kFinishThreads)
    max = max_or_nan(max, m[b]);
  max = warp_max_or_nan(max);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = max;
  __syncthreads();
  for (int w = 0; w < kFinishThreads / 32; ++w) max = max_or_nan(max, of_warp[w]);
  return numerics::is_finite(max) ? max + 0.0f : kNan;
}

__device__ void row_sums(const VocabWork& work, std::int64_t row_block, float max, Terms& terms,
                         float& total, float& entropy) {
  total = entropy = 0.0f;
  for (int base = 0; base < work.blocks; base += kTile) {
    const int n = work.blocks - base < kTile ? work.blocks - base : kTile;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kFinishThreads) {
      const float m = work.m[row_block + base + i];
      if (m == -kInfinity) {
        terms.w[i] = kNoTerm;
        continue;
      }
      const float s = work.s[row_block + base + i], e = work.e[row_block + base + i];
      const float d = fmaxf(m - max, kFloor);
      terms.s[i] = s;
      terms.w[i] = numerics::exp2(d * numerics::kLog2e);
      terms.e[i] = numerics::fma(s, d, e);
    }
    __syncthreads();
    if (threadIdx.x < 32)
#pragma unroll 4
      for (int i = static_cast<int>(threadIdx.x); i < n; i += 32) {
        const float w = terms.w[i];
        if (w == kNoTerm) continue;
        total = numerics::fma(terms.s[i], w, total);
        entropy = numerics::fma(terms.e[i], w, entropy);
      }
  }
  if (threadIdx.x >= 32) return;
  total = butterfly_sum(total);
  entropy = butterfly_sum(entropy);
}

// The lowest index whose z is not NaN, 0 if there is none.
__device__ std::int32_t first_number(const float* row, std::int64_t V, float inv_t,
                                     std::int32_t* lowest) {
  if (threadIdx.x == 0) *lowest = kNoToken;
  bool found = false;
  for (std::int64_t base = 0; base < V && !found; base += kFinishThreads) {
    const std::int64_t v = base + threadIdx.x;
    const bool number = v < V && !numerics::is_nan(row[v] * inv_t);
    found = __syncthreads_or(number) != 0;
    if (number) atomicMin(lowest, static_cast<std::int32_t>(v));
  }
  __syncthreads();
  return *lowest == kNoToken ? 0 : *lowest;
}

__device__ std::int32_t drawn_token(const Draw* draws, int parts) {
  Draw best{-kInfinity, kNoToken};
  for (int p = 0; p < parts; ++p) best = better(best, draws[p]);
  return best.token;
}

__global__ __launch_bounds__(kFinishThreads) void finish_kernel(VocabWork work, bool draw,
                                                                std::int32_t* tokens,
                                                                RowStats* stats) {
  __shared__ Terms terms;
  __shared__ float of_warp[kFinishThreads / 32];
  __shared__ std::int32_t lowest;
  const int r = static_cast<int>(blockIdx.x);
  const RowSampling s = work.sampling[r];
  const float* row = work.logits + std::int64_t{r} * work.V;
  const float inv_t = inverse_temperature(s);
  const std::int64_t row_block = std::int64_t{r} * work.blocks;
  const float max = row_max(work.m + row_block, work.blocks, of_warp);
  RowStats out{kNan, kNan, max, kNan, -kInfinity, -1};
  if (numerics::is_nan(max)) {
    if (draw) {
      const std::int32_t token = first_number(row, work.V, inv_t, &lowest);
      if (threadIdx.x == 0) tokens[r] = token;
    }
    if (threadIdx.x == 0) stats[r] = out;
    return;
  }
  float entropy;
  row_sums(work, row_block, max, terms, out.total, entropy);
  if (threadIdx.x != 0) return;
  const Cut cut = filters(s) ? work.cuts[r].cut : Cut{-kInfinity, -1};
  const std::int32_t token =
      draw ? drawn_token(work.draws + std::int64_t{r} * work.parts, work.parts) : tokens[r];
  if (draw) tokens[r] = token;
  const float z = row[token] * inv_t, log_total = numerics::log(out.total);
  out.logprob = kept(z, token, cut) ? (z - max) - log_total : -kInfinity;
  out.entropy = log_total - entropy / out.total;
  out.cut_z = cut.z;
  out.cut_index = cut.index;
  stats[r] = out;
}

// Enough warps to fill the GPU some times over; beyond that a warp takes more groups of a row,
// because its first one costs a sampler more.
VocabWork plan(const TensorView& logits_RV, const RowSampling* sampling) {
  constexpr int kWarps = kBlockThreads / 32;
  constexpr std::int64_t kWantedWarps = std::int64_t{kMultiprocessors} * 16 * 4;
  const std::int64_t R = logits_RV.dim(0), V = logits_RV.dim(1);
  const std::int64_t blocks = (V + kBlock - 1) / kBlock, all = (blocks + kGroup - 1) / kGroup;
  std::int64_t groups = (R * all + kWantedWarps - 1) / kWantedWarps;
  const std::int64_t most = (all + kWarps - 1) / kWarps;
  groups = groups < most ? groups : most;
  VocabWork work{};
  work.logits = logits_RV.as<float>();
  work.sampling = sampling;
  work.V = V;
  work.blocks = static_cast<int>(blocks);
  work.groups = static_cast<int>(groups);
  work.parts = static_cast<int>((all + groups * kWarps - 1) / (groups * kWarps));
  return work;
}

template <bool kWide, bool kDraw>
void launch(const Context& ctx, const VocabWork& work, std::int64_t R, std::int32_t* tokens,
            RowStats* stats) {
  const auto rows = static_cast<unsigned>(R), parts = static_cast<unsigned>(R * work.parts);
  const cudaStream_t stream = stream_of(ctx);
  tensor::check_cuda(
      cudaFuncSetAttribute(filter_kernel<kWide>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(sizeof(FilterShared))),
      "vocab");
  blocks_kernel<kWide, kDraw, false><<<parts, kBlockThreads, 0, stream>>>(work);
  LOCKSTEP_CUDA_LAUNCHED("vocab: blocks");
  filter_kernel<kWide><<<rows, kFilterThreads, sizeof(FilterShared), stream>>>(work);
  LOCKSTEP_CUDA_LAUNCHED("vocab: filters");
  blocks_kernel<kWide, kDraw, true><<<parts, kBlockThreads, 0, stream>>>(work);
  LOCKSTEP_CUDA_LAUNCHED("vocab: kept blocks");
  finish_kernel<<<rows, kFinishThreads, 0, stream>>>(work, kDraw, tokens, stats);
  LOCKSTEP_CUDA_LAUNCHED("vocab: rows");
}

}  // namespace

void vocab_rows(const Context& ctx, const TensorView& logits_RV, const RowSampling* sampling,
                bool draw, const TensorView& tokens_R, RowStats* stats) {
  const std::int64_t R = logits_RV.dim(0), V = logits_RV.dim(1);
  if (R == 0) return;
  VocabWork work = plan(logits_RV, sampling);
  const tensor::ArenaScope scope(*ctx.workspace);
  const auto per_block = [&] {
    return ctx.workspace->take(tensor::DType::kFp32, {R, work.blocks}).as<float>();
  };
  work.m = per_block();
  work.s = per_block();
  work.e = per_block();
  work.draws = tensor::take_structs<Draw>(*ctx.workspace, R * work.parts);
  work.cuts = tensor::take_structs<RowCut>(*ctx.workspace, R);
  const bool wide = V % 4 == 0 && reinterpret_cast<std::uintptr_t>(work.logits) % 16 == 0;
  const auto run = draw ? (wide ? launch<true, true> : launch<false, true>)
                        : (wide ? launch<true, false> : launch<false, false>);
  run(ctx, work, R, tokens_R.as<std::int32_t>(), stats);
}

}  // namespace lockstep::ops::cuda

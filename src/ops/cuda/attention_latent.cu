// Launch plan of latent attention's forward.
#include <algorithm>
#include <numbers>

#include "ops/cuda/attention_latent.cuh"
#include "ops/cuda/attention_latent.h"
#include "ops/cuda/attention_latent_decode.cuh"
#include "ops/cuda/attention_latent_launch.h"

namespace lockstep::ops::cuda {
namespace {

void launch_decode(const Context& ctx, const AttentionArgs& a, float c, const CUtensorMap& k_map,
                   int piece) {
  const std::int64_t splits = (a.most_keys + kSplit - 1) / kSplit, rows = a.heads / a.kv_heads;
  SplitStates states{nullptr, nullptr, nullptr, static_cast<int>(splits), static_cast<int>(rows),
                     1};
  if (splits > 1) {
    const std::int64_t count = a.sequences * a.heads * splits;
    const auto take = [&](std::int64_t n) {
      return ctx.workspace->take(tensor::DType::kFp32, {n}).as<float>();
    };
    states.m = take(count);
    states.l = take(count);
    states.o = take(count * a.value_width);
  }
  const auto kernel = latent_decode_kernel;
  using Plan = LatentDecodePlan;
  allow_shared(kernel, Plan::kBytes);
  const dim3 grid(grid_size(splits), grid_size(a.kv_heads), grid_size(a.sequences));
  kernel<<<grid, Plan::kThreads, Plan::kBytes, stream_of(ctx)>>>(a, c, piece, states, k_map);
  LOCKSTEP_CUDA_LAUNCHED("attention_latent_decode");
  if (splits == 1) return;
  const dim3 merge_grid(grid_size(rows), grid_size(a.kv_heads), grid_size(a.sequences));
  attention_merge_kernel<kThreads><<<merge_grid, kThreads, 0, stream_of(ctx)>>>(a, c, states);
  LOCKSTEP_CUDA_LAUNCHED("attention_latent_decode's merge");
}

}  // namespace

void attention_latent(const Context& ctx, const AttentionArgs& a) {
  const auto c = static_cast<float>(a.scale * std::numbers::log2e);
  LatentShape n = latent_shape(a);
  const std::int64_t splits = (a.most_keys + kSplit - 1) / kSplit;
  const tensor::ArenaScope scope(*ctx.workspace);
  const auto take = [&](std::int64_t count) {
    return ctx.workspace->take(tensor::DType::kFp32, {count}).as<float>();
  };
  const CUtensorMap q_map = tensor_map(
      a.q, tensor::DType::kBf16, {{a.width, 2, 64}, {a.tokens * a.heads, a.width * 2, kLatentRows}},
      CU_TENSOR_MAP_SWIZZLE_128B, "q_THK");
  const CUtensorMap k_map =
      rows_map(a.k, a.width, a.kv_heads, a.rows, std::max(n.piece, 8), "k_RJK");
  // Single queries of few heads.
  if (a.pages != nullptr && a.heads / a.kv_heads <= kDecodeRows && n.piece >= 8 &&
      a.sequences <= 65535) {
    launch_decode(ctx, a, c, k_map, n.piece);
    if (a.longest == 1) return;
    n.fewest_queries = 2;
  }
  // Few tiles with several splits: a CTA takes one split.
  if (splits > 1 && n.tiles <= kMultiprocessors / 2) {
    const std::int64_t rows = n.tiles * splits * kLatentRows;
    const LatentStates states{take(rows), take(rows), take(rows * a.value_width),
                              static_cast<int>(splits), nullptr};
    const auto kernel = attention_latent_kernel<true>;
    allow_shared(kernel, LatentPlan::kBytes);
    const unsigned blocks = grid_size(std::min<std::int64_t>(n.tiles * splits, kMultiprocessors));
    kernel<<<blocks, kLatentThreads, LatentPlan::kBytes, stream_of(ctx)>>>(a, c, n, states, q_map,
                                                                           k_map);
    LOCKSTEP_CUDA_LAUNCHED("attention_latent");
    const dim3 grid(grid_size(n.tiles), kLatentRows);
    latent_merge_kernel<128><<<grid, 128, 0, stream_of(ctx)>>>(a, c, n, states);
    LOCKSTEP_CUDA_LAUNCHED("attention_latent's merge");
    return;
  }
  const std::int64_t blocks = std::min<std::int64_t>(n.tiles, kMultiprocessors);
  float* merged = splits > 1 ? take(blocks * 32 * 256 * 4) : nullptr;
  const LatentStates states{nullptr, nullptr, nullptr, 0, reinterpret_cast<float4*>(merged)};
  const auto kernel = attention_latent_kernel<false>;
  allow_shared(kernel, LatentPlan::kBytes);
  kernel<<<grid_size(blocks), kLatentThreads, LatentPlan::kBytes, stream_of(ctx)>>>(a, c, n, states,
                                                                                    q_map, k_map);
  LOCKSTEP_CUDA_LAUNCHED("attention_latent");
}

}  // namespace lockstep::ops::cuda

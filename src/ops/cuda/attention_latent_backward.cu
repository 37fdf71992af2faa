// Launch plan of latent attention's backward.
#include <algorithm>
#include <numbers>

#include "ops/cuda/attention_latent.h"
#include "ops/cuda/attention_latent_d_k.cuh"
#include "ops/cuda/attention_latent_d_q.cuh"
#include "ops/cuda/attention_latent_launch.h"

namespace lockstep::ops::cuda {
namespace {

// Rows of [T * H, width] as the tiles of dQ read them.
CUtensorMap heads_map(const Bf16* data, std::int64_t width, const AttentionArgs& a,
                      const char* what) {
  return tensor_map(data, tensor::DType::kBf16,
                    {{width, 2, 64}, {a.tokens * a.heads, width * 2, kLatentRows}},
                    CU_TENSOR_MAP_SWIZZLE_128B, what);
}

template <bool kKeys>
void launch_d_k(const Context& ctx, const AttentionArgs& a, float c, const float* delta_TH,
                const LatentSums& sums) {
  const auto kernel = latent_d_k_kernel<kKeys>;
  allow_shared(kernel, LatentKeyPlan::kBytes);
  const std::int64_t turns = std::int64_t{sums.slots} * a.kv_heads;
  tensor::check_cuda(
      cudaMemsetAsync(sums.ticket, 0, static_cast<std::size_t>(turns + 1) * 4, stream_of(ctx)),
      "attention's turns");
  kernel<<<grid_size(std::int64_t{sums.slots} * a.heads), kLatentThreads, LatentKeyPlan::kBytes,
           stream_of(ctx)>>>(
      a, c, delta_TH, sums,
      rows_map(a.q, a.width, a.heads, a.tokens, LatentKeyPlan::kLoadRows, "q_THK"),
      rows_map(a.d_out, a.value_width, a.heads, a.tokens, LatentKeyPlan::kLoadRows, "d_out_THK"),
      rows_map(a.k, a.width, a.kv_heads, a.rows, kLatentRows, "k_TJK"));
  LOCKSTEP_CUDA_LAUNCHED(kKeys ? "attention_latent_d_k" : "attention_latent_d_v");
}

}  // namespace

void attention_latent_backward(const Context& ctx, const AttentionArgs& a) {
  const auto c = static_cast<float>(a.scale * std::numbers::log2e);
  const tensor::ArenaScope scope(*ctx.workspace);
  const auto take = [&](const tensor::Shape& shape) {
    return ctx.workspace->take(tensor::DType::kFp32, shape).as<float>();
  };
  float* delta_TH = take({a.tokens, a.heads});
  const std::int64_t rows = a.tokens * a.heads;
  constexpr int kDeltaThreads = 256;
  latent_delta_kernel<kDeltaThreads>
      <<<grid_size((rows * 32 + kDeltaThreads - 1) / kDeltaThreads), kDeltaThreads, 0,
         stream_of(ctx)>>>(a.d_out, a.out, rows, static_cast<int>(a.value_width), delta_TH);
  LOCKSTEP_CUDA_LAUNCHED("attention_latent_delta");

  const LatentShape n = latent_shape(a);
  allow_shared(latent_d_q_kernel, LatentQueryPlan::kBytes);
  const unsigned blocks = grid_size(std::min<std::int64_t>(n.tiles, kMultiprocessors));
  latent_d_q_kernel<<<blocks, kLatentThreads, LatentQueryPlan::kBytes, stream_of(ctx)>>>(
      a, c, n, delta_TH, heads_map(a.q, a.width, a, "q_THK"),
      heads_map(a.d_out, a.value_width, a, "d_out_THK"),
      rows_map(a.k, a.width, a.kv_heads, a.rows, n.piece, "k_TJK"));
  LOCKSTEP_CUDA_LAUNCHED("attention_latent_d_q");

  const std::int64_t slots = latent_slots(a.tokens, a.sequences), turns = slots * a.kv_heads;
  LOCKSTEP_CHECK(slots * a.heads < (std::int64_t{1} << 31), "attention: {} tokens of {} heads",
                 a.tokens, a.heads);
  auto* values = reinterpret_cast<float4*>(take({turns, 32, 256, 4}));
  auto* keys = reinterpret_cast<float4*>(take({a.heads > a.kv_heads ? turns : 1, 36, 256, 4}));
  auto* ticket = ctx.workspace->take(tensor::DType::kInt32, {turns + 1}).as<std::int32_t>();
  const LatentSums sums{values, keys, ticket, ticket + 1, static_cast<int>(slots)};
  launch_d_k<false>(ctx, a, c, delta_TH, sums);
  launch_d_k<true>(ctx, a, c, delta_TH, sums);
}

}  // namespace lockstep::ops::cuda

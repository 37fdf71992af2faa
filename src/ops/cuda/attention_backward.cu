// Launch plan of the attention backward.
#include <numbers>

#include "ops/cuda/attention.h"
#include "ops/cuda/attention_backward_stream.cuh"
#include "ops/cuda/attention_backward_tile.cuh"
#include "ops/cuda/attention_latent.h"
#include "ops/cuda/attention_launch.h"

namespace lockstep::ops::cuda {
namespace {

template <typename Kernel>
void launch(const Context& ctx, Kernel kernel, const char* name, dim3 grid, int bytes,
            const AttentionArgs& a, float c, const float* delta_TH) {
  allow_shared(kernel, bytes);
  kernel<<<grid, kThreads, bytes, stream_of(ctx)>>>(a, c, delta_TH);
  LOCKSTEP_CUDA_LAUNCHED(name);
}

template <int kWidth>
void launch_tiles(const Context& ctx, const AttentionArgs& a, float c, const float* delta_TH) {
  const auto tiles = static_cast<unsigned>((a.longest + kGradientRows - 1) / kGradientRows);
  const auto S = static_cast<unsigned>(a.sequences);
  const dim3 queries(tiles, static_cast<unsigned>(a.heads), S);
  const dim3 keys(tiles, static_cast<unsigned>(a.kv_heads), S);
  const bool grouped = a.heads > a.kv_heads;
  launch(ctx, attention_d_q_kernel<kWidth>, "attention_d_q", queries,
         QueryGradientShared<kWidth>::kBytes, a, c, delta_TH);
  if constexpr (kWidth <= 128) {
    launch(ctx, attention_d_kv_kernel<kWidth, true, true>, "attention_d_kv", keys,
           KeyGradientShared<kWidth, true>::bytes(grouped), a, c, delta_TH);
  } else {
    const int bytes = KeyGradientShared<kWidth, false>::bytes(grouped);
    launch(ctx, attention_d_kv_kernel<kWidth, true, false>, "attention_d_k", keys, bytes, a, c,
           delta_TH);
    launch(ctx, attention_d_kv_kernel<kWidth, false, true>, "attention_d_v", keys, bytes, a, c,
           delta_TH);
  }
}

template <int kWidth>
void launch_streams(const Context& ctx, const AttentionArgs& a, float c) {
  const tensor::ArenaScope scope(*ctx.workspace);
  const auto take = [&](const tensor::Shape& shape) {
    return ctx.workspace->take(tensor::DType::kFp32, shape).as<float>();
  };
  const std::int64_t padded = padded_tokens(a.tokens, a.sequences);
  float *lse2_HT = take({a.heads, padded}), *delta_HT = take({a.heads, padded});
  float* sums = a.heads > a.kv_heads ? take({a.tokens, a.kv_heads, 2, kWidth}) : nullptr;
  constexpr int kRowThreads = 256;
  const unsigned S = grid_size(a.sequences);
  const std::int64_t rows = (a.longest + kQueryTile - 1) / kQueryTile * kQueryTile;
  attention_rows_kernel<kRowThreads>
      <<<dim3(grid_size(rows * 32 / kRowThreads), S), kRowThreads, 0, stream_of(ctx)>>>(
          a, padded, lse2_HT, delta_HT);
  LOCKSTEP_CUDA_LAUNCHED("attention_rows");

  const auto row_map = [&](const float* data, const char* what) {
    return tensor_map(data, tensor::DType::kFp32,
                      {{padded, 4, kQueryTile}, {a.heads, padded * 4, 1}},
                      CU_TENSOR_MAP_SWIZZLE_NONE, what);
  };
  BackwardMaps maps{rows_map(a.q, kWidth, a.heads, a.tokens, kQueryTile, "q_THK"),
                    rows_map(a.k, kWidth, a.kv_heads, a.rows, kBlock, "k_TJK"),
                    rows_map(a.v, kWidth, a.kv_heads, a.rows, kBlock, "v_TJK"),
                    rows_map(a.d_out, kWidth, a.heads, a.tokens, kQueryTile, "d_out_THK"),
                    row_map(lse2_HT, "lse2"),
                    row_map(delta_HT, "delta")};
  const unsigned tiles = grid_size((a.longest + kBlock - 1) / kBlock);
  const auto d_kv = attention_d_kv_stream_kernel<kWidth>;
  allow_shared(d_kv, KeyStream<kWidth>::kBytes);
  d_kv<<<dim3(tiles, grid_size(a.kv_heads), S), KeyStream<kWidth>::kThreads,
         KeyStream<kWidth>::kBytes, stream_of(ctx)>>>(a, c, sums, maps);
  LOCKSTEP_CUDA_LAUNCHED("attention_d_kv_stream");
  maps.q = rows_map(a.q, kWidth, a.heads, a.tokens, kBlock, "q_THK");
  maps.d_out = rows_map(a.d_out, kWidth, a.heads, a.tokens, kBlock, "d_out_THK");
  const auto d_q = attention_d_q_stream_kernel<kWidth>;
  allow_shared(d_q, QueryStream<kWidth>::kBytes);
  d_q<<<dim3(tiles, grid_size(a.heads), S), QueryStream<kWidth>::kThreads,
        QueryStream<kWidth>::kBytes, stream_of(ctx)>>>(a, c, padded, lse2_HT, delta_HT, maps);
  LOCKSTEP_CUDA_LAUNCHED("attention_d_q_stream");
}

}  // namespace

void attention_backward(const Context& ctx, const AttentionArgs& a) {
  if (a.values_in_keys) return attention_latent_backward(ctx, a);
  LOCKSTEP_CHECK(!a.values_in_keys, "attention with values in keys: not on a GPU yet");
  const auto c = static_cast<float>(a.scale * std::numbers::log2e);
  LOCKSTEP_CHECK(a.sequences <= 65535 && a.heads <= 65535,
                 "attention: {} sequences and {} heads, a GPU's grid takes 65535 of each",
                 a.sequences, a.heads);
  if (a.width == a.value_width && a.longest > kQueryTile) {
    if (a.width == 64) return launch_streams<64>(ctx, a, c);
    if (a.width == 128) return launch_streams<128>(ctx, a, c);
  }
  const tensor::ArenaScope scope(*ctx.workspace);
  float* delta_TH = ctx.workspace->take(tensor::DType::kFp32, {a.tokens, a.heads}).as<float>();
  const std::int64_t rows = a.tokens * a.heads;
  constexpr int kDeltaThreads = 256;
  attention_delta_kernel<kDeltaThreads>
      <<<static_cast<unsigned>((rows * 32 + kDeltaThreads - 1) / kDeltaThreads), kDeltaThreads, 0,
         stream_of(ctx)>>>(a.d_out, a.out, rows, static_cast<int>(a.value_width), delta_TH);
  LOCKSTEP_CUDA_LAUNCHED("attention_delta");
  const std::int64_t width = a.width > a.value_width ? a.width : a.value_width;
  if (width <= 64)
    launch_tiles<64>(ctx, a, c, delta_TH);
  else if (width <= 128)
    launch_tiles<128>(ctx, a, c, delta_TH);
  else
    launch_tiles<256>(ctx, a, c, delta_TH);
}

}  // namespace lockstep::ops::cuda

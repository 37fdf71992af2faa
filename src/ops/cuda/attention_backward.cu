// Launch plan of the attention backward.
#include <numbers>

#include "ops/cuda/attention.h"
#include "ops/cuda/attention_backward_tile.cuh"

namespace lockstep::ops::cuda {
namespace {

template <typename Kernel>
void launch(const Context& ctx, Kernel kernel, const char* name, dim3 grid, int bytes,
            const AttentionArgs& a, float c, const float* delta_TH) {
  tensor::check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
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

}  // namespace

void attention_backward(const Context& ctx, const AttentionArgs& a) {
  const auto c = static_cast<float>(a.scale * std::numbers::log2e);
  LOCKSTEP_CHECK(a.sequences <= 65535 && a.heads <= 65535,
                 "attention: {} sequences and {} heads, a GPU's grid takes 65535 of each",
                 a.sequences, a.heads);
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

// Launch plan of the attention forward.
#include <numbers>

#include "ops/cuda/attention.h"
#include "ops/cuda/attention_decode.cuh"
#include "ops/cuda/attention_latent.h"
#include "ops/cuda/attention_launch.h"
#include "ops/cuda/attention_pages.cuh"
#include "ops/cuda/attention_stream.cuh"
#include "ops/cuda/attention_tile.cuh"

namespace lockstep::ops::cuda {
namespace {

template <int kWidth, int kSlots>
void launch_tiles(const Context& ctx, const AttentionArgs& a, float c, int decode_rows) {
  const bool several_splits = a.most_keys > kSplit;
  const TileShared shared(kWidth, kSlots, several_splits);
  const auto kernel = attention_tile_kernel<kWidth, kSlots>;
  allow_shared(kernel, shared.bytes);
  const std::int64_t rows = a.longest * (a.heads / a.kv_heads);
  const dim3 grid(grid_size((rows + kTileRows - 1) / kTileRows), grid_size(a.kv_heads),
                  grid_size(a.sequences));
  kernel<<<grid, kThreads, shared.bytes, stream_of(ctx)>>>(a, c, decode_rows, several_splits);
  LOCKSTEP_CUDA_LAUNCHED("attention_tile");
}

// The largest power of two, up to a block, that divides n.
int piece_of(std::int64_t n) {
  int piece = 1;
  while (piece < kBlock && n % (2 * piece) == 0) piece *= 2;
  return piece;
}

// Whether TMA can bring the blocks of the kernels whose tiles are panels of 64 columns: pages must
// have pieces that keep its swizzle.
bool has_panels(const AttentionArgs& a) {
  return a.width == a.value_width && (a.width == 64 || a.width == 128) &&
         (a.pages == nullptr || piece_of(a.page_size) >= 8);
}

template <int kWidth>
void launch_pages(const Context& ctx, const AttentionArgs& a, float c, dim3 grid,
                  const SplitStates& states) {
  using Plan = PagePlan<kWidth>;
  const int piece = piece_of(a.page_size);
  const PageMaps maps{rows_map(a.k, kWidth, a.kv_heads, a.rows, piece, "k_RJK"),
                      rows_map(a.v, kWidth, a.kv_heads, a.rows, piece, "v_RJK")};
  const auto kernel = attention_pages_kernel<kWidth>;
  allow_shared(kernel, Plan::kBytes);
  kernel<<<grid, Plan::kThreads, Plan::kBytes, stream_of(ctx)>>>(a, c, states, piece, maps);
}

template <int kWidth, int kSlots>
void launch_decode(const Context& ctx, const AttentionArgs& a, float c) {
  const std::int64_t wanted = a.longest * (a.heads / a.kv_heads);
  const std::int64_t splits = (a.most_keys + kSplit - 1) / kSplit;
  const std::int64_t rows = wanted < kDecodeRows ? wanted : kDecodeRows;
  const tensor::ArenaScope scope(*ctx.workspace);
  SplitStates states{nullptr,    nullptr, nullptr, static_cast<int>(splits), static_cast<int>(rows),
                     kDecodeRows};
  if (splits > 1) {
    const std::int64_t count = a.sequences * a.kv_heads * splits * rows;
    const auto take = [&](std::int64_t n) {
      return ctx.workspace->take(tensor::DType::kFp32, {n}).as<float>();
    };
    states.m = take(count);
    states.l = take(count);
    states.o = take(count * a.value_width);
  }
  const dim3 grid(grid_size(splits), grid_size(a.kv_heads), grid_size(a.sequences));
  if (kWidth <= 128 && has_panels(a)) {
    launch_pages<kWidth <= 128 ? kWidth : 128>(ctx, a, c, grid, states);
  } else {
    const DecodeShared shared(kWidth, kSlots);
    const auto kernel = attention_decode_kernel<kWidth, kSlots>;
    allow_shared(kernel, shared.bytes);
    kernel<<<grid, kThreads, shared.bytes, stream_of(ctx)>>>(a, c, states);
  }
  LOCKSTEP_CUDA_LAUNCHED("attention_decode");
  if (splits == 1) return;
  const dim3 merge_grid(grid_size(rows), grid_size(a.kv_heads), grid_size(a.sequences));
  attention_merge_kernel<kThreads><<<merge_grid, kThreads, 0, stream_of(ctx)>>>(a, c, states);
  LOCKSTEP_CUDA_LAUNCHED("attention_merge");
}

template <int kWidth, bool kPaged>
void launch_stream(const Context& ctx, const AttentionArgs& a, float c, int decode_rows) {
  using Plan = StreamPlan<kWidth>;
  const int piece = kPaged ? piece_of(a.page_size) : kBlock;
  const StreamMaps maps{rows_map(a.q, kWidth, a.heads, a.tokens, Plan::kRows, "q_THK"),
                        rows_map(a.k, kWidth, a.kv_heads, a.rows, piece, "k_RJK"),
                        rows_map(a.v, kWidth, a.kv_heads, a.rows, piece, "v_RJK")};
  const int bytes = Plan::bytes(a.most_keys > kSplit);
  const auto kernel = attention_stream_kernel<kWidth, kPaged>;
  allow_shared(kernel, bytes);
  const dim3 grid(grid_size((a.longest + Plan::kRows - 1) / Plan::kRows), grid_size(a.heads),
                  grid_size(a.sequences));
  kernel<<<grid, Plan::kThreads, bytes, stream_of(ctx)>>>(a, c, decode_rows, piece, maps);
  LOCKSTEP_CUDA_LAUNCHED("attention_stream");
}

template <int kWidth>
void launch_stream(const Context& ctx, const AttentionArgs& a, float c, int decode_rows) {
  if (a.pages != nullptr)
    launch_stream<kWidth, true>(ctx, a, c, decode_rows);
  else
    launch_stream<kWidth, false>(ctx, a, c, decode_rows);
}

// Rows of pages (or of T) up to this many take the decode kernel; the others the tiles.
template <int kWidth, int kTileSlots, int kDecodeSlots>
void launch(const Context& ctx, const AttentionArgs& a, float c) {
  const std::int64_t group = a.heads / a.kv_heads;
  const bool decodes = a.pages != nullptr && group <= kDecodeRows;
  if (decodes) launch_decode<kWidth, kDecodeSlots>(ctx, a, c);
  if (decodes && a.longest * group <= kDecodeRows) return;
  const int decode_rows = decodes ? kDecodeRows : 0;
  if constexpr (kWidth <= 128)
    if (a.longest >= 64 && has_panels(a)) return launch_stream<kWidth>(ctx, a, c, decode_rows);
  launch_tiles<kWidth, kTileSlots>(ctx, a, c, decode_rows);
}

}  // namespace

void attention(const Context& ctx, const AttentionArgs& a) {
  if (a.values_in_keys) return attention_latent(ctx, a);
  const auto c = static_cast<float>(a.scale * std::numbers::log2e);
  LOCKSTEP_CHECK(a.sequences <= 65535 && a.heads <= 65535,
                 "attention: {} sequences and {} heads, a GPU's grid takes 65535 of each",
                 a.sequences, a.heads);
  const std::int64_t width = a.width > a.value_width ? a.width : a.value_width;
  if (width <= 64)
    launch<64, 4, 4>(ctx, a, c);
  else if (width <= 128)
    launch<128, 3, 3>(ctx, a, c);
  else
    launch<256, 1, 2>(ctx, a, c);
}

namespace {

// One warp a row; K and V one after the other.
template <typename Word>
__global__ void write_rows_kernel(const Word* from, Word* to, const std::int32_t* slots,
                                  std::int64_t T, std::int64_t R, std::int64_t words) {
  const std::int64_t t = std::int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
  if (t >= T) return;
  const std::int64_t slot = slots[t];
  if (slot < 0 || slot >= R) return;
  for (std::int64_t i = threadIdx.x % 32; i < words; i += 32)
    to[slot * words + i] = from[t * words + i];
}

void write_rows(const Context& ctx, const TensorView& from, const TensorView& slots_T,
                const TensorView& to) {
  const std::int64_t T = from.dim(0), R = to.dim(0);
  const auto row = static_cast<std::int64_t>(from.bytes()) / T;
  if (row == 0) return;
  constexpr int kRows = 8;
  const auto blocks = static_cast<unsigned>((T + kRows - 1) / kRows);
  const auto address = reinterpret_cast<std::uintptr_t>(from.data) |
                       reinterpret_cast<std::uintptr_t>(to.data) | static_cast<std::uintptr_t>(row);
  const auto* slots = slots_T.as<std::int32_t>();
  const auto run = [&](auto word) {
    using Word = decltype(word);
    write_rows_kernel<<<blocks, kRows * 32, 0, stream_of(ctx)>>>(
        static_cast<const Word*>(from.data), static_cast<Word*>(to.data), slots, T, R,
        row / static_cast<std::int64_t>(sizeof(Word)));
  };
  if (address % 16 == 0)
    run(uint4{});
  else
    run(std::uint8_t{});
  LOCKSTEP_CUDA_LAUNCHED("write_kv");
}

}  // namespace

void write_kv(const Context& ctx, const TensorView& k_TJK, const TensorView& v_TJK,
              const TensorView& slots_T, const TensorView& k_cache_RJK,
              const TensorView& v_cache_RJK) {
  if (slots_T.dim(0) == 0) return;
  write_rows(ctx, k_TJK, slots_T, k_cache_RJK);
  if (v_TJK) write_rows(ctx, v_TJK, slots_T, v_cache_RJK);
}

}  // namespace lockstep::ops::cuda

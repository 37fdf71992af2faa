// Weight codes and their transposed copy. Blocks of 128 x 128 transpose exactly, so that recipe
// needs one read; where a scale covers a row, a column or a projection, the largest magnitudes come
// first (ops/cuda/quantize_tile.cuh).
#include "ops/cuda/quantize.h"
#include "ops/cuda/quantize_launch.cuh"
#include "ops/cuda/quantize_weight_block.cuh"

namespace lockstep::ops::cuda {
namespace {

// The rows of all experts, as the tile kernel reads them.
struct WeightSource {
  using Values = Bf16x8;
  static constexpr int kInputs = 1, kHeld = 0, kParts = 1, kTableBytes = 0;
  static constexpr int ctas(Pass) { return 3; }
  static constexpr bool kGather = false, kCombines = false, kColumnsAlone = false;
  const Bf16* w;
  std::int64_t K;

  __device__ const Bf16* at(int, std::int64_t r, std::int64_t column) const {
    return w + r * K + column;
  }
  __device__ std::int64_t stride(int) const { return K; }
};

constexpr int kBlockCtas = 2;  // of a multiprocessor

template <bool kVector>
__global__ void __launch_bounds__(kBlockThreads, kBlockCtas)
    weight_blocks(const WeightSource source, const WeightBlocks plan, unsigned* tickets) {
  extern __shared__ __align__(128) uint4 stage[];
  __shared__ BlockMemory memory;
  __shared__ WeightBlock found[4];  // number i of the CTA at i % 4; index < 0: there is none
  ThreadStats stats;
  uint4* slots = stage + threadIdx.x;
  unsigned ticket = first_ticket();
  const auto find = [&](unsigned number) {
    if (threadIdx.x != 0) return;
    const unsigned piece = piece_of(ticket), blocks = static_cast<unsigned>(plan.blocks);
    found[number % 4].index = -1;
    if (piece >= blocks) return;
    found[number % 4] = weight_block(plan, piece);
    ticket = next_ticket(tickets, blocks);
  };
  const auto fetch = [&](const WeightBlock& b) {
    Tile tile{};
    tile.row0 = static_cast<int>(b.e * plan.N + b.nb * kQuantBlock);
    tile.column0 = static_cast<int>(b.kb * kQuantBlock);
    tile.rows = b.rows, tile.columns = b.columns;
    fetch_input<kVector>(source, start_fetch(source, tile), 0, slots);
  };
  find(0);
  __syncthreads();
  if (kVector && found[0].index >= 0) fetch(found[0]);
  find(1);
  __syncthreads();
  for (unsigned number = 0; found[number % 4].index >= 0; ++number) {
    const WeightBlock b = found[number % 4], &next = found[(number + 1) % 4];
    find(number + 2);
    if constexpr (kVector)
      asm volatile("cp.async.wait_all;" ::: "memory");
    else
      fetch(b);
    Bf16x8 x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) read_values(slots + i * kBlockThreads, x[i]);
    if (kVector && next.index >= 0) fetch(next);
    quantize_weight_block<kVector>(plan, b, x, static_cast<int>(number % 2), memory, stats);
  }
  if (plan.stats != nullptr) flush_stats(stats, plan.stats);
}

// The rows of each projection of a slab.
inline constexpr int kMostParts = 16;
struct Parts {
  int count;
  std::int64_t rows[kMostParts];
};

// One CTA an expert: the scale of each projection to its rows, the slab's to the columns.
__global__ void tensor_scales(const std::uint32_t* row_largest, Parts parts, std::int64_t N,
                              std::int64_t K, bool pow2, float* scales, float* scales_t,
                              QuantStats* stats) {
  __shared__ std::uint32_t shared;
  ThreadStats mine;
  const std::int64_t e = blockIdx.x;
  std::uint32_t slab = 0;
  std::int64_t first = e * N;
  for (int i = 0; i < parts.count; first += parts.rows[i++]) {
    if (threadIdx.x == 0) shared = 0;
    __syncthreads();
    std::uint32_t amax = 0;
    for (std::int64_t r = threadIdx.x; r < parts.rows[i]; r += blockDim.x)
      amax = max(amax, row_largest[first + r]);
    atomicMax(&shared, amax);
    __syncthreads();
    amax = shared;
    slab = max(slab, amax);
    for (std::int64_t r = threadIdx.x; r < parts.rows[i]; r += blockDim.x)
      scales[first + r] = scale_of(amax, pow2);
    if (threadIdx.x == 0 && stats != nullptr) mine.count_block(amax);
    __syncthreads();
  }
  if (scales_t != nullptr)
    for (std::int64_t k = threadIdx.x; k < K; k += blockDim.x)
      scales_t[e * K + k] = scale_of(slab, pow2);
  if (stats != nullptr) flush_stats(mine, stats);
}

void weight_rows(const Context& ctx, const TensorView& w_ENK, WeightScales kind, bool pow2,
                 const Parts& parts, const Fp8Weight& out, const Fp8Weight& out_t, bool vector,
                 QuantStats* stats) {
  const std::int64_t E = w_ENK.dim(0), N = w_ENK.dim(1), K = w_ENK.dim(2);
  const tensor::ArenaScope scope(*ctx.workspace);
  const WeightSource source{w_ENK.as<Bf16>(), K};
  TilePlan plan;
  plan.M = E * N, plan.K = K, plan.pow2 = pow2, plan.stats = stats;
  plan.experts = E, plan.segment_rows = N;
  plan.row_tiles = E * ((N + kQuantBlock - 1) / kQuantBlock);
  plan.row_codes = out.codes_ENK.fp8(), plan.row_scales = out.scales.as<float>();
  const bool per_row = kind == WeightScales::kPerRow;
  plan.row_largest = take_largest(ctx, E * (per_row ? N + K : N));
  if (out_t.codes_ENK) {
    plan.column_codes = out_t.codes_ENK.fp8(), plan.column_scales = out_t.scales.as<float>();
    plan.column_stride = N;
    if (per_row) plan.column_largest = plan.row_largest + E * N;
  }
  launch_tiles<Pass::kLargest>(ctx, source, plan, vector);
  if (!per_row) {
    tensor_scales<<<static_cast<unsigned>(E), 1024, 0, stream_of(ctx)>>>(
        plan.row_largest, parts, N, K, pow2, plan.row_scales, plan.column_scales, stats);
    LOCKSTEP_CUDA_LAUNCHED("tensor_scales");
    plan.row_largest = nullptr;  // the scales are there
  }
  launch_tiles<Pass::kEncode>(ctx, source, plan, vector);
}

}  // namespace

void quantize_weight(const Context& ctx, const TensorView& w_ENK, WeightScales kind, bool pow2,
                     const std::int64_t* part_rows, std::int64_t parts, const Fp8Weight& out,
                     const Fp8Weight& out_t, QuantStats* stats) {
  const std::int64_t E = w_ENK.dim(0), N = w_ENK.dim(1), K = w_ENK.dim(2);
  LOCKSTEP_CHECK(parts <= kMostParts, "quantize_weight: {} projections in a slab, at most {}",
                 parts, kMostParts);
  if (E == 0) return;
  const bool transpose = static_cast<bool>(out_t.codes_ENK);
  const bool vector = K % 8 == 0 && aligned16(w_ENK.data) && aligned16(out.codes_ENK.data) &&
                      (!transpose || (N % 16 == 0 && aligned16(out_t.codes_ENK.data)));
  if (kind != WeightScales::kBlock128) {
    Parts p{static_cast<int>(parts), {}};
    std::copy_n(part_rows, parts, p.rows);
    weight_rows(ctx, w_ENK, kind, pow2, p, out, out_t, vector, stats);
    return;
  }
  WeightBlocks plan{N, K};
  plan.row_blocks = (N + kQuantBlock - 1) / kQuantBlock;
  plan.column_blocks = (K + kQuantBlock - 1) / kQuantBlock;
  plan.blocks = E * plan.row_blocks * plan.column_blocks;
  plan.pow2 = pow2, plan.stats = stats;
  plan.codes = out.codes_ENK.fp8(), plan.scales = out.scales.as<float>();
  plan.codes_t = transpose ? out_t.codes_ENK.fp8() : nullptr;
  plan.scales_t = transpose ? out_t.scales.as<float>() : nullptr;
  if (plan.blocks == 0) return;
  LOCKSTEP_CHECK(std::max(plan.blocks, E * N) < std::int64_t{1} << 31,
                 "quantize_weight: {} x {} x {} is too large", E, N, K);
  const WeightSource source{w_ENK.as<Bf16>(), K};
  const auto grid = static_cast<unsigned>(
      std::min<std::int64_t>(plan.blocks, std::int64_t{kMultiprocessors} * kBlockCtas));
  constexpr int kStage = kStageBytes<WeightSource>;
  const auto kernel = vector ? weight_blocks<true> : weight_blocks<false>;
  allow_shared_memory(kernel, kStage);
  kernel<<<grid, kBlockThreads, kStage, stream_of(ctx)>>>(source, plan, ctx.tickets);
  LOCKSTEP_CUDA_LAUNCHED("quantize_weight");
}

}  // namespace lockstep::ops::cuda

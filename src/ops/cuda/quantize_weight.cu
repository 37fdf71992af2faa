// Weight codes and their transposed copy. Blocks of 128 x 128 transpose exactly, so that recipe
// needs one read; where a scale covers a row, a column or a projection, the largest magnitudes come
// first (ops/cuda/quantize_tile.cuh).
#include "ops/cuda/quantize.h"
#include "ops/cuda/quantize_launch.cuh"

namespace lockstep::ops::cuda {
namespace {

struct BlockPlan {
  std::int64_t N, K;
  std::int64_t row_blocks, column_blocks, blocks;
  bool pow2;
  const Bf16* w;
  Fp8 *codes, *codes_t;  // codes_t may be null
  float *scales, *scales_t;
  QuantStats* stats;
};

// Bytes of 4 x 4 codes, transposed: byte r of out[c] is byte c of in[r].
__device__ inline void transpose4(const std::uint32_t (&in)[4], std::uint32_t (&out)[4]) {
  const std::uint32_t ab = __byte_perm(in[0], in[1], 0x5140),
                      AB = __byte_perm(in[0], in[1], 0x7362);
  const std::uint32_t cd = __byte_perm(in[2], in[3], 0x5140),
                      CD = __byte_perm(in[2], in[3], 0x7362);
  out[0] = __byte_perm(ab, cd, 0x5410), out[1] = __byte_perm(ab, cd, 0x7632);
  out[2] = __byte_perm(AB, CD, 0x5410), out[3] = __byte_perm(AB, CD, 0x7632);
}

struct BlockMemory {
  std::uint32_t largest[2][kTileThreads / 32];  // two, so that one barrier a block is enough
  alignas(16) std::uint8_t codes[kQuantBlock][kQuantBlock];  // laid out as in TileMemory
};

template <bool kVector>
__global__ void __launch_bounds__(kTileThreads, 3) weight_blocks(const BlockPlan plan) {
  __shared__ BlockMemory memory;
  ThreadStats stats;
  const int thread = static_cast<int>(threadIdx.x), tc = thread % 16, tr = thread / 16;
  int turn = 0;
  for (std::int64_t b = blockIdx.x; b < plan.blocks; b += gridDim.x, turn ^= 1) {
    const std::int64_t kb = b % plan.column_blocks, nb = b / plan.column_blocks % plan.row_blocks;
    const std::int64_t e = b / (plan.column_blocks * plan.row_blocks);
    const std::int64_t n0 = nb * kQuantBlock, k0 = kb * kQuantBlock;
    const int rows = static_cast<int>(min(std::int64_t{kQuantBlock}, plan.N - n0));
    const int columns = static_cast<int>(min(std::int64_t{kQuantBlock}, plan.K - k0));
    const int n = columns - tc * 8;
    const std::int64_t first = (e * plan.N + n0 + tr * 8) * plan.K + k0 + tc * 8;
    Bf16x8 x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      x[i] = load8<kVector>(plan.w + first + i * plan.K, tr * 8 + i < rows ? n : 0);
    std::uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) amax = max_u16x2(amax, halves_max(x[i]));
    amax = __reduce_max_sync(kAllLanes, max(amax >> 16, amax & 0xFFFFu));
    if (thread % 32 == 0) memory.largest[turn][thread / 32] = amax;
    __syncthreads();
    amax = 0;
#pragma unroll
    for (int i = 0; i < kTileThreads / 32; ++i) amax = max(amax, memory.largest[turn][i]);
    amax <<= 16;
    const float s = scale_of(amax, plan.pow2), inv = 1.0f / s;
    if (thread == 0) {
      plan.scales[b] = s;
      if (plan.codes_t != nullptr)
        plan.scales_t[(e * plan.column_blocks + kb) * plan.row_blocks + nb] = s;
      if (plan.stats != nullptr) stats.count_block(amax);
    }
    std::uint32_t left[8], right[8];  // columns 0 .. 3 and 4 .. 7 of each row
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint2 codes = encode8(x[i], inv);
      left[i] = codes.x, right[i] = codes.y;
      if (tr * 8 + i >= rows) continue;
      store_codes<kVector>(plan.codes + first + i * plan.K, codes, n);
      if (plan.stats == nullptr || n <= 0) continue;
      stats.values += min(n, 8);
      if (inv == inv)
        stats.flushed += nonzero(x[i]) - nonzero_codes(codes.x) - nonzero_codes(codes.y);
    }
    if (plan.codes_t == nullptr) continue;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto& from = h == 0 ? left : right;
      std::uint32_t upper[4], lower[4];
      transpose4({from[0], from[1], from[2], from[3]}, upper);
      transpose4({from[4], from[5], from[6], from[7]}, lower);
#pragma unroll
      for (int c = 0; c < 4; ++c)
        *reinterpret_cast<uint2*>(&memory.codes[tc * 8 + h * 4 + c][(tr ^ tc) * 8]) =
            make_uint2(upper[c], lower[c]);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int at = thread + kTileThreads * k, c = at / 8, piece = at % 8, turned = c / 8;
      if (c >= columns || piece * 16 >= rows) continue;
      const uint4 v =
          *reinterpret_cast<const uint4*>(&memory.codes[c][(piece ^ (turned / 2)) * 16]);
      const uint4 codes = turned % 2 != 0 ? make_uint4(v.z, v.w, v.x, v.y) : v;
      Fp8* to = plan.codes_t + (e * plan.K + k0 + c) * plan.N + n0 + piece * 16;
      if constexpr (kVector) {
        *reinterpret_cast<uint4*>(to) = codes;
      } else {
        const std::uint32_t part[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
        for (int i = 0; i < 16; ++i)
          if (piece * 16 + i < rows) to[i] = static_cast<Fp8>(part[i / 4] >> (i % 4 * 8));
      }
    }
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

// The rows of all experts, as the tile kernel reads them.
struct WeightSource {
  using Values = Bf16x8;
  static constexpr int kParts = 1, kCtas = 3;
  const Bf16* w;
  std::int64_t K;

  template <Pass kPass, bool kVector>
  __device__ void load(std::int64_t row, std::int64_t column, int n, Bf16x8 (&out)[1][8],
                       int i) const {
    out[0][i] = load8<kVector>(w + row * K + column, n);
  }
};

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
  plan.row_largest = take_largest(ctx, E * N);
  const bool per_row = kind == WeightScales::kPerRow;
  if (out_t.codes_ENK) {
    plan.column_codes = out_t.codes_ENK.fp8(), plan.column_scales = out_t.scales.as<float>();
    plan.column_stride = N;
    if (per_row) plan.column_largest = take_largest(ctx, E * K);
  }
  launch_tiles<Pass::kLargest>(ctx, source, plan, vector);
  if (per_row) {
    scales_from_largest(ctx, plan.row_largest, E * N, pow2, plan.row_scales, stats, nullptr, 1);
    if (out_t.codes_ENK)
      scales_from_largest(ctx, plan.column_largest, E * K, pow2, plan.column_scales, nullptr,
                          nullptr, 1);
  } else {
    tensor_scales<<<static_cast<unsigned>(E), 1024, 0, stream_of(ctx)>>>(
        plan.row_largest, parts, N, K, pow2, plan.row_scales, plan.column_scales, stats);
    LOCKSTEP_CUDA_LAUNCHED("tensor_scales");
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
  BlockPlan plan{N, K};
  plan.row_blocks = (N + kQuantBlock - 1) / kQuantBlock;
  plan.column_blocks = (K + kQuantBlock - 1) / kQuantBlock;
  plan.blocks = E * plan.row_blocks * plan.column_blocks;
  plan.pow2 = pow2, plan.w = w_ENK.as<Bf16>(), plan.stats = stats;
  plan.codes = out.codes_ENK.fp8(), plan.scales = out.scales.as<float>();
  plan.codes_t = transpose ? out_t.codes_ENK.fp8() : nullptr;
  plan.scales_t = transpose ? out_t.scales.as<float>() : nullptr;
  if (plan.blocks == 0) return;
  const auto grid = static_cast<unsigned>(
      std::min<std::int64_t>(plan.blocks, std::int64_t{kMultiprocessors} * 3));
  if (vector)
    weight_blocks<true><<<grid, kTileThreads, 0, stream_of(ctx)>>>(plan);
  else
    weight_blocks<false><<<grid, kTileThreads, 0, stream_of(ctx)>>>(plan);
  LOCKSTEP_CUDA_LAUNCHED("quantize_weight");
}

}  // namespace lockstep::ops::cuda

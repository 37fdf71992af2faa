// Quantizing a weight's block of 128 x 128, codes and transposed codes at once: what a kernel that
// has the block's BF16 values in registers needs (quantize_weight, and an optimizer that writes
// them).
#pragma once

#include "ops/cuda/quantize_stats.cuh"

namespace lockstep::ops::cuda {

inline constexpr int kBlockThreads = 256;

struct WeightBlocks {
  std::int64_t N, K;
  std::int64_t row_blocks, column_blocks, blocks;
  bool pow2;
  Fp8 *codes, *codes_t;  // codes_t may be null
  float *scales, *scales_t;
  QuantStats* stats;  // may be null
};

struct WeightBlock {
  std::int64_t index, e, nb, kb;
  int rows, columns;
};
__device__ inline WeightBlock weight_block(const WeightBlocks& w, std::int64_t b) {
  const std::int64_t kb = b % w.column_blocks, nb = b / w.column_blocks % w.row_blocks;
  return {b,
          b / (w.column_blocks * w.row_blocks),
          nb,
          kb,
          static_cast<int>(min(std::int64_t{kQuantBlock}, w.N - nb * kQuantBlock)),
          static_cast<int>(min(std::int64_t{kQuantBlock}, w.K - kb * kQuantBlock))};
}

// Bytes of 4 x 4 codes, transposed: byte r of out[c] is byte c of in[r].
__device__ inline void transpose4(const std::uint32_t* in, std::uint32_t (&out)[4]) {
  const std::uint32_t ab = __byte_perm(in[0], in[1], 0x5140),
                      AB = __byte_perm(in[0], in[1], 0x7362);
  const std::uint32_t cd = __byte_perm(in[2], in[3], 0x5140),
                      CD = __byte_perm(in[2], in[3], 0x7362);
  out[0] = __byte_perm(ab, cd, 0x5410), out[1] = __byte_perm(ab, cd, 0x7632);
  out[2] = __byte_perm(AB, CD, 0x5410), out[3] = __byte_perm(AB, CD, 0x7632);
}

struct BlockMemory {
  std::uint32_t largest[2][kBlockThreads / 32];  // two, so that one barrier a block is enough
  alignas(16) std::uint8_t codes[kQuantBlock][kQuantBlock];  // laid out as in TileMemory
};

// x: thread t has rows t / 16 * 8 .. + 7 and columns t % 16 * 8 .. + 7 of the block, zeros outside
// the matrix. `turn` alternates between 0 and 1 from block to block.
template <bool kVector>
__device__ inline void quantize_weight_block(const WeightBlocks& w, const WeightBlock& b,
                                             const Bf16x8 (&x)[8], int turn, BlockMemory& memory,
                                             ThreadStats& stats) {
  const int thread = static_cast<int>(threadIdx.x), tc = thread % 16, tr = thread / 16;
  std::uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) amax = larger2(amax, largest2(x[i]));
  amax &= kMagnitudes;
  amax = __reduce_max_sync(kAllLanes, max(amax >> 16, amax & 0xFFFFu));
  if (thread % 32 == 0) memory.largest[turn][thread / 32] = amax;
  __syncthreads();
  amax = 0;
#pragma unroll
  for (int i = 0; i < kBlockThreads / 32; ++i) amax = max(amax, memory.largest[turn][i]);
  amax <<= 16;
  const float s = scale_of(amax, w.pow2), inv = 1.0f / s;
  if (thread == 0) {
    w.scales[b.index] = s;
    if (w.codes_t != nullptr) w.scales_t[(b.e * w.column_blocks + b.kb) * w.row_blocks + b.nb] = s;
    if (w.stats != nullptr) stats.count_block(amax);
  }
  const std::int64_t n0 = b.nb * kQuantBlock, k0 = b.kb * kQuantBlock;
  const int n = b.columns - tc * 8, rows = n > 0 ? b.rows - tr * 8 : 0;
  Fp8* to = w.codes + (b.e * w.N + n0 + tr * 8) * w.K + k0 + tc * 8;
  std::uint32_t left[8], right[8];  // columns 0 .. 3 and 4 .. 7 of each row
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint2 codes = encode8(x[i], inv);
    left[i] = codes.x, right[i] = codes.y;
    if (i >= rows) continue;
    store_codes<kVector>(to + i * w.K, codes, n);
    if (w.stats == nullptr) continue;
    stats.values += min(n, 8);
    stats.flushed += flushed(x[i], codes);
  }
  if (w.codes_t == nullptr) return;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    std::uint32_t upper[4], lower[4];
    transpose4(h == 0 ? left : right, upper);
    transpose4((h == 0 ? left : right) + 4, lower);
#pragma unroll
    for (int c = 0; c < 4; ++c)
      *reinterpret_cast<uint2*>(&memory.codes[tc * 8 + h * 4 + c][(tr ^ tc) * 8]) =
          make_uint2(upper[c], lower[c]);
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int at = thread + kBlockThreads * k, c = at / 8, piece = at % 8, turned = c / 8;
    if (c >= b.columns || piece * 16 >= b.rows) continue;
    const uint4 v = *reinterpret_cast<const uint4*>(&memory.codes[c][(piece ^ (turned / 2)) * 16]);
    store_column_codes<kVector>(w.codes_t + (b.e * w.K + k0 + c) * w.N + n0 + piece * 16,
                                turned % 2 != 0 ? make_uint4(v.z, v.w, v.x, v.y) : v,
                                b.rows - piece * 16);
  }
}

}  // namespace lockstep::ops::cuda

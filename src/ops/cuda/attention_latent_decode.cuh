// Latent attention of sequences with one query and at most 16 query heads, over pages that TMA can
// bring: there the keys' bytes are what takes time, and tiles of 64 rows would compute for nobody.
// Eight warps compute on m16n8k16 steps: each the scores of 16 of a block's 128 keys, then 64
// columns of the output. A warp of its own fetches the keys in panels of 64 columns, which stay in
// shared memory as values. A CTA takes one split; splits are merged as those of
// attention_decode.cuh.
#pragma once

#include "ops/cuda/attention_decode.cuh"
#include "ops/cuda/attention_latent_parts.cuh"

namespace lockstep::ops::cuda {

struct LatentDecodePlan {
  static constexpr int kWarps = kLatentPanels - 1;  // that compute: as many as panels of values
  static constexpr int kComputing = 32 * kWarps;
  static constexpr int kThreads =
      kComputing + 128;  // a warpgroup, that registers can be taken from
  static constexpr int kSlots = 12;
  static constexpr int kWidth = kLatentPanels * 64;
  static constexpr int kPairStride = DecodeShared::kPairStride;
  static constexpr int kQuery = kSlots * kKeyPanelBytes;  // offsets
  static constexpr int kWeights = kQuery + kDecodeRows * (kWidth + 8) * 2;
  static constexpr int kPairs = kWeights + kDecodeRows * (kBlock + 8) * 2;
  static constexpr int kHighest = kPairs + kDecodeRows * kPairStride * 4;
  static constexpr int kTotals = kHighest + kWarps * kDecodeRows * 4;
  static constexpr int kBroken = kTotals + kDecodeRows * 4;
  static constexpr int kBarriers = kBroken + kWarps * 64 * 4;
  static constexpr int kBytes = 1024 + kBarriers + 16 * kSlots;
  static_assert(kBytes <= kSharedMemory);
};

__global__ void __launch_bounds__(LatentDecodePlan::kThreads, 1)
    latent_decode_kernel(AttentionArgs a, float c, int piece, SplitStates states,
                         const __grid_constant__ CUtensorMap k_map) {
  using Plan = LatentDecodePlan;
  extern __shared__ unsigned char unaligned[];
  const int split = blockIdx.x, j = blockIdx.y, s = blockIdx.z;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const Sequence seq(a, s);
  const int begin = split * kSplit;
  if (seq.queries != 1 || begin >= seq.keys) return;
  const int group = static_cast<int>(a.heads / a.kv_heads);
  const int end = min(seq.keys, begin + kSplit);
  const int blocks = (end - begin + kBlock - 1) / kBlock;
  const int panels = (static_cast<int>(a.width) + 63) / 64;

  const std::uint32_t start = shared_address(unaligned), base = (start + 1023) & ~1023u;
  unsigned char* const shared = unaligned + (base - start);
  const BrokenValues broken{base + Plan::kBroken};  // all rows see all keys: there are none
  broken.clear(Plan::kWarps * 64, Plan::kThreads);
  // Panel p of block b is piece i = b * panels + p of the stream.
  const auto slot = [&](int i) {
    return base + static_cast<std::uint32_t>(i % Plan::kSlots * kKeyPanelBytes);
  };
  const auto full = [&](int i) {
    return base + static_cast<std::uint32_t>(Plan::kBarriers + i % Plan::kSlots * 16);
  };
  const auto free = [&](int i) { return full(i) + 8; };
  const auto parity = [&](int i) { return static_cast<std::uint32_t>(i / Plan::kSlots % 2); };
  if (threadIdx.x == 0) {
    for (int i = 0; i < Plan::kSlots; ++i) {
      // Every lane of a warp arrives, for racecheck's sake (release_stage says why).
      mbarrier_init(full(i), 32);
      mbarrier_init(free(i), 32);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (warp >= Plan::kWarps) {
    give_registers<40>();
    if (warp > Plan::kWarps) return;
    const int offset = lane * piece;
    const auto row_of = [&](int b) {
      const int position = begin + b * kBlock + offset;
      const int row = offset < kBlock ? key_row(a, seq, s, position, end) : -1;
      return row < 0 ? -kBlock : row;  // outside the tensor: zeros
    };
    int next = row_of(0);
    for (int b = 0; b < blocks; ++b) {
      const int row = next;
      next = row_of(b + 1);
      for (int p = 0; p < panels; ++p) {
        const int i = b * panels + p;
        mbarrier_wait(free(i), parity(i) ^ 1);
        if (lane == 0)
          mbarrier_arrive_expect(full(i), kKeyPanelBytes);
        else
          mbarrier_arrive(full(i));
        __syncwarp();
        if (offset < kBlock)
          tma_load_3d(slot(i) + static_cast<std::uint32_t>(offset * 128), &k_map, full(i), p * 64,
                      j, row, L2Hint::kEvictFirst);
      }
    }
    return;
  }

  take_registers<232>();
  constexpr int kTogether = 1;
  const SharedTile q_tile{base + Plan::kQuery, Plan::kWidth + 8};
  for (int i = threadIdx.x; i < kDecodeRows * (Plan::kWidth / 8); i += Plan::kComputing) {
    const int row = i / (Plan::kWidth / 8), column = i % (Plan::kWidth / 8) * 8;
    const bool present = row < group && column < a.width;
    const std::int64_t at = (seq.begin * a.heads + j * group + row) * a.width + column;
    copy_async(q_tile.at(row, column), a.q + (present ? at : 0), present);
  }
  copy_commit();
  copy_wait<0>();
  named_sync(kTogether, Plan::kComputing);
  unsigned q[Plan::kWidth / 16][4];
#pragma unroll
  for (int d = 0; d < Plan::kWidth / 16; ++d) q_tile.load_a(q[d], 0, d * 16, lane);

  float* const pairs = reinterpret_cast<float*>(shared + Plan::kPairs);
  float* const highest = reinterpret_cast<float*>(shared + Plan::kHighest);
  float* const totals = reinterpret_cast<float*>(shared + Plan::kTotals);
  const SharedTile p_tile{base + Plan::kWeights, kBlock + 8};
  constexpr int kKeys = kBlock / Plan::kWarps;
  const int k_row = warp * kKeys + lane % 8 + lane / 16 * 8, k_chunk = lane / 8 % 2;
  const auto release = [&](int i) { mbarrier_arrive(free(i)); };
  float m[2] = {kNone, kNone}, mc[2] = {kNone, kNone}, l = 0;
  float o[8][4] = {};
  for (int b = 0; b < blocks; ++b) {
    // 1. Scores of the warp's 16 keys.
    const int first_panel = b * panels;
    float x[2][4] = {};
#pragma unroll
    for (int p = 0; p < kLatentPanels; ++p) {
      if (p >= panels) continue;
      mbarrier_wait(full(first_panel + p), parity(first_panel + p));
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        unsigned y[4];
        load_matrix_x4(panel_at<kKeyPanelBytes>(slot(first_panel + p), k_row, k_chunk + 2 * d), y);
        mma_bf16(x[0], q[4 * p + d], y[0], y[1]);
        mma_bf16(x[1], q[4 * p + d], y[2], y[3]);
      }
    }

    // 2. Softmax.
    const int present = end - (begin + b * kBlock);  // keys of this block
    float corr[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = kNone;
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (warp * kKeys + i * 8 + t * 2 + e >= present) x[i][2 * r + e] = kNone;
          top = fmaxf(top, x[i][2 * r + e]);
        }
      top = quad_max(top);
      if (t == 0) highest[warp * kDecodeRows + g + 8 * r] = top;
    }
    named_sync(kTogether, Plan::kComputing);
    // All warps have their scores: a panel that is no values is done with.
    if (panels == kLatentPanels && warp == 0) release(first_panel + kLatentPanels - 1);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = m[r];
#pragma unroll
      for (int w = 0; w < Plan::kWarps; ++w) top = fmaxf(top, highest[w * kDecodeRows + g + 8 * r]);
      const float top_c = top * c;
      corr[r] = softmax_exp2(mc[r] - top_c);
      m[r] = top;
      mc[r] = top_c;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float y = softmax_exp2(numerics::fma(x[i][2 * r], c, -top_c));
        const float z = softmax_exp2(numerics::fma(x[i][2 * r + 1], c, -top_c));
        const int tile = warp * 2 + i;
        pairs[(g + 8 * r) * Plan::kPairStride + tile * 4 + t] = y + z;
        *reinterpret_cast<unsigned*>(shared + Plan::kWeights +
                                     ((g + 8 * r) * (kBlock + 8) + tile * 8 + t * 2) * 2) =
            pack_bf16(y, z);
      }
    }
#pragma unroll
    for (auto& tile : o) {
      tile[0] = tile[0] * corr[0];
      tile[1] = tile[1] * corr[0];
      tile[2] = tile[2] * corr[1];
      tile[3] = tile[3] * corr[1];
    }
    named_sync(kTogether, Plan::kComputing);

    // 3. Output: panel `warp`. What lies behind the keys may be anything and becomes zeros.
    if (warp < panels) {
      const std::uint32_t values = slot(first_panel + warp);
      if (present < kBlock) {
        clear_keys<32>(values, present, lane);
        __syncwarp();
      }
#pragma unroll
      for (int i = 0; i < kBlock / 16; ++i) {
        unsigned w[4], y[4];
        p_tile.load_a(w, 0, i * 16, lane);
#pragma unroll
        for (int d = 0; d < 4; ++d) {
          load_matrix_x4_transposed(
              panel_at<kKeyPanelBytes>(values, i * 16 + lane % 16, lane / 16 + 2 * d), y);
          mma_bf16(o[2 * d], w, y[0], y[1]);
          mma_bf16(o[2 * d + 1], w, y[2], y[3]);
        }
      }
      release(first_panel + warp);
    }
    if (warp < 2) {  // the sums of row g + 8 * warp
      l = l * (warp == 0 ? corr[0] : corr[1]);
      const float* from = pairs + (g + 8 * warp) * Plan::kPairStride + t;
#pragma unroll
      for (int i = 0; i < kBlock / 8; ++i) l = l + from[i * 4];
    }
  }

  if (warp < 2) {
    const float sum = quad_total(l);
    if (t == 0) totals[g + 8 * warp] = sum;
  }
  named_sync(kTogether, Plan::kComputing);
  finish_split<8>(a, c, states, seq, s, j, split, group, o, m, totals, broken);
}

}  // namespace lockstep::ops::cuda

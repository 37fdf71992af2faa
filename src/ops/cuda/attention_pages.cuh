// attention_decode.cuh's kernel for widths 64 and 128 (the same for keys and values) and pages that
// TMA can bring: a warp of its own fetches blocks of keys and values, pieces of pages at a time;
// four warps compute.
#pragma once

#include "ops/cuda/attention_decode.cuh"
#include "ops/cuda/attention_panels.cuh"

namespace lockstep::ops::cuda {

template <int kWidth>
struct PagePlan {
  static constexpr int kThreads = 160;
  static constexpr int kPanels = kWidth / 64, kPanelBytes = kBlock * 128;
  static constexpr int kSlots = kWidth == 64 ? 4 : 3;
  static constexpr int kSlotBytes = kPanels * kPanelBytes;
  static constexpr int kPairStride = DecodeShared::kPairStride;
  static constexpr int kQuery = kSlots * kSlotBytes;  // offsets
  static constexpr int kWeights = kQuery + kDecodeRows * (kWidth + 8) * 2;
  static constexpr int kPairs = kWeights + kDecodeRows * (kBlock + 8) * 2;
  static constexpr int kHighest = kPairs + kDecodeRows * kPairStride * 4;
  static constexpr int kTotals = kHighest + kWarps * kDecodeRows * 4;
  static constexpr int kBroken = kTotals + kDecodeRows * 4;
  static constexpr int kBarriers = kBroken + kWidth * 4;
  static constexpr int kAlign = 1024;
  static constexpr int kBytes = kAlign + kBarriers + 8 + 16 * kSlots;
};

struct PageMaps {
  CUtensorMap k, v;  // [width, heads, rows], boxes of 64 columns of one head in `piece` rows
};

// The fetching warp: keys and values of a split in the order k0 v0 k1 v1 .. .
template <int kWidth>
__device__ __forceinline__ void fetch_pages(const AttentionArgs& a, const Sequence& seq, int s,
                                            int j, int begin, int end, int piece,
                                            std::uint32_t base, const BrokenValues& broken,
                                            const PageMaps& maps) {
  using Plan = PagePlan<kWidth>;
  constexpr int kSlots = Plan::kSlots;
  const int lane = static_cast<int>(threadIdx.x) % 32, offset = lane * piece;
  const std::uint32_t raw = base + Plan::kBarriers;
  const int blocks = (end - begin + kBlock - 1) / kBlock;
  const auto row_of = [&](int b) {
    return offset < kBlock ? key_row(a, seq, s, begin + b * kBlock + offset, end) : -1;
  };
  std::uint32_t parity = 0;
  int next = row_of(0);
  for (int b = 0; b < blocks; ++b) {
    const int row = next < 0 ? -kBlock : next;  // outside the tensor: zeros
    next = row_of(b + 1);
    const int block = begin + b * kBlock;
    const int late = seq.first_position + 1 - block;  // keys from here on not all rows see
#pragma unroll
    for (int values = 0; values < 2; ++values) {
      const int i = 2 * b + values, slot = i % kSlots;
      const std::uint32_t full = raw + 8 + slot * 16, to = base + slot * Plan::kSlotBytes;
      const bool checked = values == 1 && late < kBlock;
      mbarrier_wait(full + 8, static_cast<std::uint32_t>(i / kSlots % 2) ^ 1u);
      if (lane == 0)
        mbarrier_arrive_expect(checked ? raw : full, Plan::kSlotBytes);
      else if (!checked)
        mbarrier_arrive(full);
      __syncwarp();
      if (offset < kBlock)
#pragma unroll
        for (int panel = 0; panel < Plan::kPanels; ++panel)
          tma_load_3d(to + panel * Plan::kPanelBytes + offset * 128,
                      values == 1 ? &maps.v : &maps.k, checked ? raw : full, panel * 64, j, row,
                      L2Hint::kEvictFirst);
      if (!checked) continue;
      mbarrier_wait(raw, parity);
      parity ^= 1;
      check_values<Plan::kPanels>(to, late, block, end, broken);
      mbarrier_arrive(full);
    }
  }
}

template <int kWidth>
__global__ __launch_bounds__(PagePlan<kWidth>::kThreads) void attention_pages_kernel(
    AttentionArgs a, float c, SplitStates states, int piece,
    const __grid_constant__ PageMaps maps) {
  using Plan = PagePlan<kWidth>;
  constexpr int kSlots = Plan::kSlots;
  extern __shared__ unsigned char unaligned[];
  const int split = blockIdx.x, j = blockIdx.y, s = blockIdx.z;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const Sequence seq(a, s);
  const int group = static_cast<int>(a.heads / a.kv_heads);
  const std::int64_t rows = std::int64_t{seq.queries} * group;
  const int begin = split * kSplit;
  if (rows == 0 || rows > kDecodeRows || begin >= seq.keys) return;
  const int count = static_cast<int>(rows);
  const int end = seq.keys < begin + kSplit ? seq.keys : begin + kSplit;
  const int blocks = (end - begin + kBlock - 1) / kBlock;

  const std::uint32_t start = shared_address(unaligned);
  const std::uint32_t base = (start + Plan::kAlign - 1) / Plan::kAlign * Plan::kAlign;
  unsigned char* shared = unaligned + (base - start);
  const std::uint32_t raw = base + Plan::kBarriers;
  const auto full = [&](int i) { return raw + 8 + i % kSlots * 16; };
  const BrokenValues broken{base + Plan::kBroken};
  broken.clear(kWidth, Plan::kThreads);
  if (threadIdx.x == 0) {
    mbarrier_init(raw, 1);
    for (int i = 0; i < kSlots; ++i) {
      // Every lane arrives, for racecheck's sake (release_stage says why).
      mbarrier_init(full(i), 32);
      mbarrier_init(full(i) + 8, 32 * kWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (warp == kWarps) {
    fetch_pages<kWidth>(a, seq, s, j, begin, end, piece, base, broken, maps);
    return;
  }

  const auto place_of = [&](int row) {
    return (seq.begin + row / group) * a.heads + j * group + row % group;
  };
  const SharedTile q_tile{base + Plan::kQuery, kWidth + 8};
  for (int i = threadIdx.x; i < kDecodeRows * (kWidth / 8); i += 32 * kWarps) {
    const int row = i / (kWidth / 8), column = i % (kWidth / 8) * 8;
    copy_async(q_tile.at(row, column), a.q + place_of(row < count ? row : 0) * kWidth + column,
               row < count);
  }
  copy_commit();
  copy_wait<0>();
  constexpr int kTogether = 1;
  named_sync(kTogether, 32 * kWarps);
  unsigned q[kWidth / 16][4];
#pragma unroll
  for (int d = 0; d < kWidth / 16; ++d) q_tile.load_a(q[d], 0, d * 16, lane);

  float* pairs = reinterpret_cast<float*>(shared + Plan::kPairs);
  float* warp_max = reinterpret_cast<float*>(shared + Plan::kHighest);
  float* totals = reinterpret_cast<float*>(shared + Plan::kTotals);
  const SharedTile p_tile{base + Plan::kWeights, kBlock + 8};
  int position[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = g + 8 * r;
    position[r] = seq.first_position + (row < count ? row : count - 1) / group;
  }
  constexpr int kColumns = kWidth / kWarps;  // of values, a warp
  constexpr int kKeys = kBlock / kWarps;
  const int k_row = warp * kKeys + lane % 8 + lane / 16 * 8, k_chunk = lane / 8 % 2;
  const int v_row = lane % 16, v_chunk = warp * kColumns / 8 + lane / 16;
  float m[2] = {kNone, kNone}, mc[2] = {kNone, kNone}, l = 0;
  float o[kColumns / 8][4] = {};
  for (int b = 0; b < blocks; ++b) {
    const int first = begin + b * kBlock + warp * kKeys;
    const auto slot = [&](int i) { return base + i % kSlots * Plan::kSlotBytes; };
    const auto wait = [&](int i) {
      mbarrier_wait(full(i), static_cast<std::uint32_t>(i / kSlots % 2));
    };
    const auto release = [&](int i) { mbarrier_arrive(full(i) + 8); };
    wait(2 * b);
    float p[kKeys / 8][4] = {};
#pragma unroll
    for (int d = 0; d < kWidth / 16; ++d)
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) {
        unsigned y[4];
        load_matrix_x4(panel_at<Plan::kPanelBytes>(slot(2 * b), k_row + i * 16, k_chunk + 2 * d),
                       y);
        mma_bf16(p[2 * i], q[d], y[0], y[1]);
        mma_bf16(p[2 * i + 1], q[d], y[2], y[3]);
      }
    release(2 * b);
    float corr[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = kNone;
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (first + i * 8 + t * 2 + e > position[r]) p[i][2 * r + e] = kNone;
          top = fmaxf(top, p[i][2 * r + e]);
        }
      top = quad_max(top);
      if (t == 0) warp_max[warp * kDecodeRows + g + 8 * r] = top;
    }
    named_sync(kTogether, 32 * kWarps);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = m[r];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) top = fmaxf(top, warp_max[w * kDecodeRows + g + 8 * r]);
      const float top_c = top * c;
      corr[r] = softmax_exp2(mc[r] - top_c);
      m[r] = top;
      mc[r] = top_c;
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        const float x = softmax_exp2(numerics::fma(p[i][2 * r], c, -top_c));
        const float y = softmax_exp2(numerics::fma(p[i][2 * r + 1], c, -top_c));
        const int tile = warp * (kKeys / 8) + i;
        pairs[(g + 8 * r) * Plan::kPairStride + tile * 4 + t] = x + y;
        *reinterpret_cast<unsigned*>(shared + Plan::kWeights +
                                     ((g + 8 * r) * (kBlock + 8) + tile * 8 + t * 2) * 2) =
            pack_bf16(x, y);
      }
    }
#pragma unroll
    for (auto& tile : o) {
      tile[0] = tile[0] * corr[0];
      tile[1] = tile[1] * corr[0];
      tile[2] = tile[2] * corr[1];
      tile[3] = tile[3] * corr[1];
    }
    named_sync(kTogether, 32 * kWarps);
    wait(2 * b + 1);
#pragma unroll
    for (int i = 0; i < kBlock / 16; ++i) {
      unsigned x[4], y[4];
      p_tile.load_a(x, 0, i * 16, lane);
#pragma unroll
      for (int d = 0; d < kColumns / 16; ++d) {
        load_matrix_x4_transposed(
            panel_at<Plan::kPanelBytes>(slot(2 * b + 1), v_row + i * 16, v_chunk + 2 * d), y);
        mma_bf16(o[2 * d], x, y[0], y[1]);
        mma_bf16(o[2 * d + 1], x, y[2], y[3]);
      }
    }
    release(2 * b + 1);
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
  named_sync(kTogether, 32 * kWarps);
  finish_split<kColumns / 8>(a, c, states, seq, s, j, split, count, o, m, totals, broken);
}

}  // namespace lockstep::ops::cuda

// Attention backward on wgmma, widths 64 and 128 (docs/numerics.md, section 8). dK and dV: a CTA
// has 128 keys, two consumer warpgroups 64 each, and tiles of 64 queries stream through. Scores are
// computed transposed (keys by queries), so that p and ds leave the accumulators as the left
// operand of dV and dK. dQ: a CTA has 128 queries, blocks of 128 keys stream through.
#pragma once

#include "ops/cuda/attention_panels.cuh"

namespace lockstep::ops::cuda {

// lse2 and delta as the kernels below read them: [H, padded tokens], each sequence from a multiple
// of 64 on and filled up to one, so that a tile's rows are one aligned piece. Filled-up rows have
// lse2 = +inf, which makes p = +0, and delta = 0.
inline constexpr int kQueryTile = 64;
__host__ __device__ inline std::int64_t padded_tokens(std::int64_t tokens, std::int64_t sequences) {
  return ((tokens + kQueryTile - 1) / kQueryTile + sequences) * kQueryTile;
}
__device__ inline int padded_begin(std::int64_t begin, int s) {
  return static_cast<int>(padded_tokens(begin, s));
}

// A warp a row of every head.
template <int kRowThreads>
__global__ __launch_bounds__(kRowThreads) void attention_rows_kernel(AttentionArgs a,
                                                                     std::int64_t padded,
                                                                     float* lse2_HT,
                                                                     float* delta_HT) {
  const int s = blockIdx.y, lane = static_cast<int>(threadIdx.x) % 32;
  const Sequence seq(a, s);
  const int query =
      static_cast<int>(blockIdx.x) * (kRowThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (query >= (seq.queries + kQueryTile - 1) / kQueryTile * kQueryTile) return;
  const int Kv = static_cast<int>(a.value_width);
  const std::int64_t to = padded_begin(seq.begin, s) + query;
#pragma unroll 4
  for (int h = 0; h < a.heads; ++h) {
    const bool present = query < seq.queries;
    const std::int64_t place = (seq.begin + (present ? query : 0)) * a.heads + h;
    const float delta = row_delta(a.d_out + place * Kv, a.out + place * Kv, Kv);
    if (lane != 0) continue;
    delta_HT[h * padded + to] = present ? delta : 0.0f;
    lse2_HT[h * padded + to] = present ? a.lse2[place] : -kNone;
  }
}

struct BackwardMaps {
  CUtensorMap q, k, v, d_out;  // [width, heads, rows], boxes of 64 columns, one head
  CUtensorMap lse2, delta;     // [padded tokens, H], boxes of 64 tokens
};

template <int kWidth>
struct KeyStream {
  static constexpr int kThreads = 384;
  static constexpr int kPanels = kWidth / 64, kSteps = kWidth / 16;
  static constexpr int kStages = 3;
  static constexpr int kKeyPanel = kBlock * 128, kQueryPanel = kQueryTile * 128;
  static constexpr int kKeyBytes = kPanels * kKeyPanel, kQueryBytes = kPanels * kQueryPanel;
  static constexpr int kRowBytes = kQueryTile * 4;
  static constexpr int kStageBytes = 2 * kQueryBytes;
  static constexpr int kRowsAt = 2 * kKeyBytes + kStages * kStageBytes;  // offset
  static constexpr int kBarriers = kRowsAt + kStages * 2 * kRowBytes;    // offset
  static constexpr int kAlign = 1024;
  static constexpr int kBytes = kAlign + kBarriers + 8 + 16 * kStages;
};

// sums: [T, J, 2, width], the heads of a group so far (null where a group is one head).
template <int kWidth>
__global__ __launch_bounds__(KeyStream<kWidth>::kThreads, 1) void attention_d_kv_stream_kernel(
    AttentionArgs a, float c, float* sums, const __grid_constant__ BackwardMaps maps) {
  using Plan = KeyStream<kWidth>;
  constexpr int kStages = Plan::kStages, kPanels = Plan::kPanels;
  extern __shared__ unsigned char unaligned[];
  const int s = blockIdx.z, j = blockIdx.y, first = static_cast<int>(blockIdx.x) * kBlock;
  const Sequence seq(a, s);
  const int n = seq.queries;
  if (first >= n) return;
  const int group = static_cast<int>(a.heads / a.kv_heads);
  const int tiles = (n - first + kQueryTile - 1) / kQueryTile, items = tiles * group;

  const std::uint32_t start = shared_address(unaligned);
  const std::uint32_t base = (start + Plan::kAlign - 1) / Plan::kAlign * Plan::kAlign;
  const std::uint32_t k_at = base, v_at = base + Plan::kKeyBytes;
  const auto q_at = [&](int stage) {
    return base + 2 * Plan::kKeyBytes + stage * Plan::kStageBytes;
  };
  const auto rows_at = [&](int stage) {
    return base + Plan::kRowsAt + stage * 2 * Plan::kRowBytes;
  };
  const std::uint32_t keys_full = base + Plan::kBarriers;
  const auto full = [&](int stage) { return keys_full + 8 + stage * 16; };
  const auto free = [&](int stage) { return full(stage) + 8; };
  if (threadIdx.x == 0) {
    mbarrier_init(keys_full, 1);
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full(i), 1);
      mbarrier_init(free(i), 2);
    }
    fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  if (warpgroup == 0) {
    give_registers<24>();
    if (threadIdx.x >= 32) return;
    const bool leader = threadIdx.x == 0;
    const int row = static_cast<int>(seq.begin), padded = padded_begin(seq.begin, s);
    if (leader) {
      mbarrier_arrive_expect(keys_full, 2 * Plan::kKeyBytes);
      for (int panel = 0; panel < kPanels; ++panel) {
        tma_load_3d(k_at + panel * Plan::kKeyPanel, &maps.k, keys_full, panel * 64, j, row + first);
        tma_load_3d(v_at + panel * Plan::kKeyPanel, &maps.v, keys_full, panel * 64, j, row + first);
      }
    }
    for (int i = 0; i < items; ++i) {
      const int stage = i % kStages, h = j * group + i / tiles;
      const int query = first + i % tiles * kQueryTile;
      const std::uint32_t d_out_at = q_at(stage) + Plan::kQueryBytes;
      mbarrier_wait(free(stage), static_cast<std::uint32_t>(i / kStages % 2) ^ 1u);
      const bool whole = query + kQueryTile <= n;
      if (!whole) {
        load_last_rows<kWidth, kQueryTile>(a.q + (seq.begin * a.heads + h) * kWidth,
                                           a.heads * kWidth, query, n, q_at(stage));
        load_last_rows<kWidth, kQueryTile>(a.d_out + (seq.begin * a.heads + h) * kWidth,
                                           a.heads * kWidth, query, n, d_out_at);
        finish_last_rows();
      }
      if (leader) {
        mbarrier_arrive_expect(full(stage), (whole ? Plan::kStageBytes : 0) + 2 * Plan::kRowBytes);
        tma_load_2d(rows_at(stage), &maps.lse2, full(stage), padded + query, h);
        tma_load_2d(rows_at(stage) + Plan::kRowBytes, &maps.delta, full(stage), padded + query, h);
        for (int panel = 0; whole && panel < kPanels; ++panel) {
          tma_load_3d(q_at(stage) + panel * Plan::kQueryPanel, &maps.q, full(stage), panel * 64, h,
                      row + query);
          tma_load_3d(d_out_at + panel * Plan::kQueryPanel, &maps.d_out, full(stage), panel * 64, h,
                      row + query);
        }
      }
      __syncwarp();
    }
    return;
  }

  take_registers<240>();
  const int half = warpgroup - 1, lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32 % 4, t = lane % 4;
  const bool signals = threadIdx.x % 128 == 0;
  std::uint32_t k = k_at + half * 64 * 128, v = v_at + half * 64 * 128;
  const int key0 = first + half * 64, key = key0 + warp * 16 + lane / 4;  // and key + 8
  const auto* rows = reinterpret_cast<const float2*>(unaligned + (base - start) + Plan::kRowsAt);
  float d_k[kWidth / 2], d_v[kWidth / 2];
  std::uint32_t p[4][4], ds[4][4];
#pragma unroll
  for (int i = 0; i < kWidth / 2; ++i) d_k[i] = d_v[i] = 0.0f;
  mbarrier_wait(keys_full, 0);
  for (int head = 0; head < group; ++head) {
    // The first tile lies before all keys of the second warpgroup.
    for (int tile = 0; tile < tiles; ++tile) {
      const int i = head * tiles + tile, stage = i % kStages;
      const int query = first + tile * kQueryTile;
      mbarrier_wait(full(stage), static_cast<std::uint32_t>(i / kStages % 2));
      const std::uint32_t q = q_at(stage), d_out = q + Plan::kQueryBytes;
      // Not to be kept as a row of descriptors in registers, which are all taken.
      asm volatile("" : "+r"(k), "+r"(v));
      float x[32], y[32];
      wgmma_fence();
#pragma unroll
      for (int d = 0; d < Plan::kSteps; ++d)
        wgmma_bf16<Major::kK, Major::kK>(x, operand_128b(k + d / 4 * Plan::kKeyPanel + d % 4 * 32),
                                         operand_128b(q + d / 4 * Plan::kQueryPanel + d % 4 * 32),
                                         d > 0);
      wgmma_commit();
#pragma unroll
      for (int d = 0; d < Plan::kSteps; ++d)
        wgmma_bf16<Major::kK, Major::kK>(
            y, operand_128b(v + d / 4 * Plan::kKeyPanel + d % 4 * 32),
            operand_128b(d_out + d / 4 * Plan::kQueryPanel + d % 4 * 32), d > 0);
      wgmma_commit();
      wgmma_wait<1>();
      keep_registers(x);
      const float2* lse2 = rows + stage * kQueryTile + t;
      const float2* delta = lse2 + kQueryTile / 2;
      const bool masked = query < key0 + 63;
#pragma unroll
      for (int m = 0; m < 8; ++m) {
        const float2 l = lse2[m * 4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& z = x[4 * m + e];
          z = softmax_exp2(numerics::fma(z, c, -(e % 2 == 0 ? l.x : l.y)));
          if (masked && key + e / 2 * 8 > query + m * 8 + t * 2 + e % 2) z = 0.0f;
        }
      }
      wgmma_wait<0>();
      keep_registers(y);
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 l = delta[(2 * m + e / 2) * 4];
          const int i = 8 * m + 2 * e;
          p[m][e] = pack_bf16(x[i], x[i + 1]);
          ds[m][e] = pack_bf16(x[i] * (y[i] - l.x), x[i + 1] * (y[i + 1] - l.y));
        }
      wgmma_fence();
#pragma unroll
      for (int m = 0; m < 4; ++m)
        wgmma_bf16<Major::kMn>(d_v, p[m], operand_128b(d_out + m * 2048, 1024, Plan::kQueryPanel),
                               true);
#pragma unroll
      for (int m = 0; m < 4; ++m)
        wgmma_bf16<Major::kMn>(d_k, ds[m], operand_128b(q + m * 2048, 1024, Plan::kQueryPanel),
                               true);
      wgmma_commit();
      wgmma_wait<0>();
      keep_registers(d_k);
      keep_registers(d_v);
      if (signals) mbarrier_arrive(free(stage));
    }
    if (group == 1) break;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (key + 8 * r >= n) continue;
      float* row = sums + ((seq.begin + key + 8 * r) * a.kv_heads + j) * 2 * kWidth + t * 2;
#pragma unroll
      for (int m = 0; m < kWidth / 8; ++m) {
        float2 *of_k = reinterpret_cast<float2*>(row + m * 8),
               *of_v = reinterpret_cast<float2*>(row + kWidth + m * 8);
        float2 sum_k{d_k[4 * m + 2 * r], d_k[4 * m + 2 * r + 1]};
        float2 sum_v{d_v[4 * m + 2 * r], d_v[4 * m + 2 * r + 1]};
        if (head > 0) {
          const float2 old_k = *of_k, old_v = *of_v;
          sum_k = {old_k.x + sum_k.x, old_k.y + sum_k.y};
          sum_v = {old_v.x + sum_v.x, old_v.y + sum_v.y};
        }
        if (head + 1 < group) {
          *of_k = sum_k;
          *of_v = sum_v;
          sum_k = sum_v = {0, 0};
        }
        d_k[4 * m + 2 * r] = sum_k.x;
        d_k[4 * m + 2 * r + 1] = sum_k.y;
        d_v[4 * m + 2 * r] = sum_v.x;
        d_v[4 * m + 2 * r + 1] = sum_v.y;
      }
    }
  }
  const auto scale = static_cast<float>(a.scale);
  const float by_scale[2] = {scale, scale}, by_one[2] = {1.0f, 1.0f};
  const std::int64_t place = (seq.begin * a.kv_heads + j) * kWidth, stride = a.kv_heads * kWidth;
  named_sync(1 + half, 128);  // this warpgroup's rows of k and v are no longer read
  store_rows<kWidth, Plan::kKeyPanel>(d_k, by_scale, k, a.d_k + place, stride, key0, n);
  store_rows<kWidth, Plan::kKeyPanel>(d_v, by_one, v, a.d_v + place, stride, key0, n);
}

template <int kWidth>
struct QueryStream {
  static constexpr int kThreads = 384, kRows = 128;
  static constexpr int kPanels = kWidth / 64, kSteps = kWidth / 16;
  static constexpr int kStages = 2;
  static constexpr int kPanel = kBlock * 128;
  static constexpr int kTileBytes = kPanels * kPanel;
  static constexpr int kBarriers = 2 * kTileBytes + kStages * 2 * kTileBytes;  // offset
  static constexpr int kAlign = 1024;
  static constexpr int kBytes = kAlign + kBarriers + 8 + 32 * kStages;
};

template <int kWidth>
__global__ __launch_bounds__(QueryStream<kWidth>::kThreads, 1) void attention_d_q_stream_kernel(
    AttentionArgs a, float c, std::int64_t padded_count, const float* lse2_HT,
    const float* delta_HT, const __grid_constant__ BackwardMaps maps) {
  using Plan = QueryStream<kWidth>;
  constexpr int kStages = Plan::kStages, kPanels = Plan::kPanels;
  extern __shared__ unsigned char unaligned[];
  const int s = blockIdx.z, h = blockIdx.y, j = h / static_cast<int>(a.heads / a.kv_heads);
  const Sequence seq(a, s);
  const int n = seq.queries, tiles = (n + Plan::kRows - 1) / Plan::kRows;
  if (static_cast<int>(blockIdx.x) >= tiles) return;
  const int tile = tiles - 1 - static_cast<int>(blockIdx.x), first = tile * Plan::kRows;
  const int blocks = tile + 1;  // query tiles and key blocks are the same rows

  const std::uint32_t start = shared_address(unaligned);
  const std::uint32_t base = (start + Plan::kAlign - 1) / Plan::kAlign * Plan::kAlign;
  const std::uint32_t q_at = base, d_out_at = base + Plan::kTileBytes;
  const auto k_at = [&](int stage) { return base + (2 + 2 * stage) * Plan::kTileBytes; };
  const auto v_at = [&](int stage) { return k_at(stage) + Plan::kTileBytes; };
  const std::uint32_t rows_full = base + Plan::kBarriers;
  const auto k_full = [&](int stage) { return rows_full + 8 + stage * 32; };
  const auto k_free = [&](int stage) { return k_full(stage) + 8; };
  const auto v_full = [&](int stage) { return k_full(stage) + 16; };
  const auto v_free = [&](int stage) { return k_full(stage) + 24; };
  if (threadIdx.x == 0) {
    mbarrier_init(rows_full, 1);
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(k_full(i), 1);
      mbarrier_init(v_full(i), 1);
      mbarrier_init(k_free(i), 2);
      mbarrier_init(v_free(i), 2);
    }
    fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  const int row = static_cast<int>(seq.begin);
  if (warpgroup == 0) {
    give_registers<24>();
    if (threadIdx.x >= 32) return;
    const bool leader = threadIdx.x == 0;
    const auto load = [&](std::uint32_t to, const CUtensorMap* map, std::uint32_t full, int head,
                          int at) {
      for (int panel = 0; panel < kPanels; ++panel)
        tma_load_3d(to + panel * Plan::kPanel, map, full, panel * 64, head, at);
    };
    if (leader) {
      mbarrier_arrive_expect(rows_full, 2 * Plan::kTileBytes);
      load(q_at, &maps.q, rows_full, h, row + first);
      load(d_out_at, &maps.d_out, rows_full, h, row + first);
    }
    for (int b = 0; b < blocks; ++b) {
      const int stage = b % kStages;
      const std::uint32_t parity = static_cast<std::uint32_t>(b / kStages % 2) ^ 1u;
      const int at = b * kBlock;
      if (at + kBlock <= n) {
        if (leader) {
          mbarrier_wait(k_free(stage), parity);
          mbarrier_arrive_expect(k_full(stage), Plan::kTileBytes);
          load(k_at(stage), &maps.k, k_full(stage), j, row + at);
          mbarrier_wait(v_free(stage), parity);
          mbarrier_arrive_expect(v_full(stage), Plan::kTileBytes);
          load(v_at(stage), &maps.v, v_full(stage), j, row + at);
        }
      } else {  // ds of absent keys is 0, but 0 times what TMA would bring may be NaN
        mbarrier_wait(k_free(stage), parity);
        mbarrier_wait(v_free(stage), parity);
        const std::int64_t head = (seq.begin * a.kv_heads + j) * kWidth;
        load_last_rows<kWidth, kBlock>(a.k + head, a.kv_heads * kWidth, at, n, k_at(stage));
        load_last_rows<kWidth, kBlock>(a.v + head, a.kv_heads * kWidth, at, n, v_at(stage));
        finish_last_rows();
        if (leader) {
          mbarrier_arrive(k_full(stage));
          mbarrier_arrive(v_full(stage));
        }
      }
      __syncwarp();
    }
    return;
  }

  take_registers<240>();
  const int half = warpgroup - 1, lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32 % 4, t = lane % 4;
  const bool signals = threadIdx.x % 128 == 0;
  const std::uint32_t q = q_at + half * 64 * 128, d_out = d_out_at + half * 64 * 128;
  const int row0 = first + half * 64, mine = row0 + warp * 16 + lane / 4;  // and mine + 8
  float lse2[2], delta[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = mine + 8 * r < n ? mine + 8 * r : n - 1;
    const std::int64_t at = h * padded_count + padded_begin(seq.begin, s) + query;
    lse2[r] = lse2_HT[at];
    delta[r] = delta_HT[at];
  }
  float d_q[kWidth / 2];
#pragma unroll
  for (int i = 0; i < kWidth / 2; ++i) d_q[i] = 0.0f;
  mbarrier_wait(rows_full, 0);
  for (int b = 0; b < blocks; ++b) {
    const int stage = b % kStages;
    const auto parity = static_cast<std::uint32_t>(b / kStages % 2);
    float x[64];
    std::uint32_t ds[8][4];
    {
      float y[64];
      mbarrier_wait(k_full(stage), parity);
      wgmma_fence();
#pragma unroll
      for (int d = 0; d < Plan::kSteps; ++d)
        wgmma_bf16<Major::kK, Major::kK>(
            x, operand_128b(q + d / 4 * Plan::kPanel + d % 4 * 32),
            operand_128b(k_at(stage) + d / 4 * Plan::kPanel + d % 4 * 32), d > 0);
      wgmma_commit();
      mbarrier_wait(v_full(stage), parity);
#pragma unroll
      for (int d = 0; d < Plan::kSteps; ++d)
        wgmma_bf16<Major::kK, Major::kK>(
            y, operand_128b(d_out + d / 4 * Plan::kPanel + d % 4 * 32),
            operand_128b(v_at(stage) + d / 4 * Plan::kPanel + d % 4 * 32), d > 0);
      wgmma_commit();
      wgmma_wait<1>();
      keep_registers(x);
      const bool masked = b * kBlock + kBlock - 1 > row0;
      const int column = b * kBlock + t * 2;
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const int r = i / 2 % 2;
        x[i] = softmax_exp2(numerics::fma(x[i], c, -lse2[r]));
        if (masked && column + i / 4 * 8 + i % 2 > mine + 8 * r) x[i] = 0.0f;
      }
      wgmma_wait<0>();
      keep_registers(y);
      if (signals) mbarrier_arrive(v_free(stage));
#pragma unroll
      for (int i = 0; i < 64; ++i) x[i] = x[i] * (y[i] - delta[i / 2 % 2]);
    }
#pragma unroll
    for (int m = 0; m < 8; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) ds[m][e] = pack_bf16(x[8 * m + 2 * e], x[8 * m + 2 * e + 1]);
    float part[kWidth / 2];
    wgmma_fence();
#pragma unroll
    for (int m = 0; m < 8; ++m)
      wgmma_bf16<Major::kMn>(part, ds[m], operand_128b(k_at(stage) + m * 2048, 1024, Plan::kPanel),
                             m > 0);
    wgmma_commit();
    wgmma_wait<0>();
    keep_registers(part);
    if (signals) mbarrier_arrive(k_free(stage));
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) d_q[i] = d_q[i] + part[i];
  }
  const auto scale = static_cast<float>(a.scale);
  const float by_scale[2] = {scale, scale};
  named_sync(1 + half, 128);
  store_rows<kWidth, Plan::kPanel>(d_q, by_scale, q, a.d_q + (seq.begin * a.heads + h) * kWidth,
                                   a.heads * kWidth, row0, n);
}

}  // namespace lockstep::ops::cuda

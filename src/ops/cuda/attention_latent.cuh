// Attention forward where values are the first columns of the key rows (docs/numerics.md, section
// 8). A CTA works on tiles of 64 rows: query heads of one token, or of several where they are few.
// A block's keys stay in shared memory, in panels of 64 columns: each of two warpgroups computes
// the scores of 64 of the 128 keys, then every other panel of the output from the same memory; a
// panel that was used is refilled with the next block's. p goes through the place of the last
// panel, which holds no values.
#pragma once

#include "ops/cuda/attention_latent_parts.cuh"

namespace lockstep::ops::cuda {

struct LatentPlan {
  static constexpr int kQ = 0;
  static constexpr int kKeys = kLatentPanels * kRowPanelBytes;
  static constexpr int kP = kKeys + (kLatentPanels - 1) * kKeyPanelBytes;
  static constexpr int kPairs = kKeys + kLatentPanels * kKeyPanelBytes;  // [8][64][4]
  static constexpr int kMax = kPairs + 8 * kLatentRows * 4 * 4;          // [2][64]
  static constexpr int kTotal = kMax + 2 * kLatentRows * 4;              // [64]
  static constexpr int kBroken = kTotal + kLatentRows * 4;  // a byte a column of the values
  static constexpr int kBarriers = kBroken + (kLatentPanels - 1) * 64;
  static constexpr int kBytes = 1024 + kBarriers + (2 + 2 * kLatentPanels) * 8;
  static_assert(kBytes <= kSharedMemory);
};

// What splits leave: [splits, tiles, 64 rows], where a CTA has one split of a tile.
struct LatentStates {
  float *m, *l, *o;  // o: [.., Kv]
  int splits;        // 0: a CTA goes through all of a tile's splits itself
  float4* merged;    // there: [CTAs, 32, 256], what its threads have merged so far
};

template <bool kSplits>
__global__ void __launch_bounds__(kLatentThreads, 1)
    attention_latent_kernel(AttentionArgs a, float c, LatentShape n, LatentStates states,
                            const __grid_constant__ CUtensorMap q_map,
                            const __grid_constant__ CUtensorMap k_map) {
  using Plan = LatentPlan;
  extern __shared__ unsigned char unaligned[];
  const std::uint32_t start = shared_address(unaligned), base = (start + 1023) & ~1023u;
  unsigned char* const shared = unaligned + (base - start);
  float* const pairs = reinterpret_cast<float*>(shared + Plan::kPairs);
  float* const highest = reinterpret_cast<float*>(shared + Plan::kMax);
  float* const totals = reinterpret_cast<float*>(shared + Plan::kTotal);
  const std::uint32_t q_full = base + Plan::kBarriers, q_free = q_full + 8;
  const auto full = [&](int panel) { return q_full + 16 + static_cast<std::uint32_t>(panel * 16); };
  const auto free = [&](int panel) { return full(panel) + 8; };
  const auto keys_at = [&](int panel) {
    return base + static_cast<std::uint32_t>(Plan::kKeys + panel * kKeyPanelBytes);
  };
  if (threadIdx.x == 0) {
    mbarrier_init(q_full, 1);
    mbarrier_init(q_free, 8);
    for (int p = 0; p < kLatentPanels; ++p) {
      mbarrier_init(full(p), 4);
      mbarrier_init(free(p), p == kLatentPanels - 1 ? 8 : 4);
    }
    fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = warpgroup_index();
  const int lane = static_cast<int>(threadIdx.x) % 32,
            warp = static_cast<int>(threadIdx.x) / 32 % 4;
  const std::int64_t items = kSplits ? n.tiles * states.splits : n.tiles;
  constexpr int kSplitBlocks = kSplit / kBlock;
  const bool copied = n.piece >= 8;
  std::uint32_t q_parity = 0, parity = 0;  // of the tile's and of the block's barriers
  LatentTile tile;
  // The item's tile and its blocks; false: nothing to do.
  int split = 0, first_block = 0, end_block = 0;
  const auto locate = [&](std::int64_t item) {
    split = kSplits ? static_cast<int>(item / n.tiles) : 0;
    if (!tile.locate(a, n, kSplits ? item % n.tiles : item)) return false;
    const int blocks = (tile.end + kBlock - 1) / kBlock;
    first_block = split * kSplitBlocks;
    end_block = kSplits ? min(blocks, first_block + kSplitBlocks) : blocks;
    return first_block < end_block;
  };

  if (warpgroup == 2) {
    give_registers<40>();
    for (std::int64_t item = blockIdx.x; item < items; item += gridDim.x) {
      if (!locate(item)) continue;
      if (warp == 0 && lane == 0) {
        mbarrier_wait(q_free, q_parity ^ 1);
        mbarrier_arrive_expect(q_full, static_cast<std::uint32_t>(n.panels * kRowPanelBytes));
        for (int p = 0; p < n.panels; ++p)
          tma_load_2d(base + static_cast<std::uint32_t>(Plan::kQ + p * kRowPanelBytes), &q_map,
                      q_full, p * 64, static_cast<int>(tile.token * a.heads) + tile.head);
      }
      q_parity ^= 1;
      int from = copied ? piece_row(a, tile, first_block * kBlock, warp, n.piece) : 0;
      for (int b = first_block; b < end_block; ++b, parity ^= 1) {
        const bool ahead = copied && b + 1 < end_block;
        const int next = ahead ? piece_row(a, tile, (b + 1) * kBlock, warp, n.piece) : -kBlock;
        for (int p = 0; p < n.panels; ++p) {
          mbarrier_wait(free(p), parity ^ 1);
          load_key_panel(a, tile, b * kBlock, p, keys_at(p), warp, n.piece, copied, from, &k_map,
                         full(p));
        }
        if (copied) {
          // What pages hold comes from memory: it is on its way to the L2 cache one block ahead.
          for (int p = 0; p < n.panels && next >= 0 && a.pages != nullptr; ++p)
            tma_prefetch_3d(&k_map, p * 64, tile.j, next);
          from = next;
          continue;
        }
        finish_last_rows();
        for (int p = 0; p < n.panels && lane == 0; ++p) mbarrier_arrive(full(p));
        __syncwarp();
      }
    }
    return;
  }

  take_registers<232>();
  const int group = warpgroup, t = lane % 4;
  const int row[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
  const std::uint32_t p_at = base + Plan::kP;
  const LatentBroken broken{shared + Plan::kBroken};
  const auto release = [&](std::uint32_t barrier) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  };
  for (std::int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    if (!locate(item)) continue;
    mbarrier_wait(q_full, q_parity);
    q_parity ^= 1;
    const bool several = tile.first_end < tile.end;  // tokens, which see different keys
    const int token[2] = {tile.index(row[0]), tile.index(row[1])};
    float o[4][32];
    float m[2], mc[2], l[2], merged_m[2], merged_l[2];
    for (int b = first_block; b < end_block; ++b, parity ^= 1) {
      if (b % kSplitBlocks == 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (float& x : o[i]) x = 0.0f;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          m[h] = mc[h] = kNone;
          l[h] = 0.0f;
        }
      }
      // 1. Scores of the warpgroup's 64 keys.
      float x[32];
#pragma unroll
      for (float& y : x) y = 0.0f;
      for (int p = 0; p < n.panels; ++p) {
        mbarrier_wait(full(p), parity);
        const std::uint32_t q = base + static_cast<std::uint32_t>(Plan::kQ + p * kRowPanelBytes);
        const std::uint32_t k = keys_at(p) + static_cast<std::uint32_t>(group * 64 * 128);
        keep_registers(x);
        wgmma_fence();
#pragma unroll
        for (std::uint32_t d = 0; d < 4; ++d)
          wgmma_bf16<Major::kK, Major::kK>(x, operand_128b(q + d * 32), operand_128b(k + d * 32),
                                           true);
        wgmma_commit();
        keep_registers(x);
      }
      wgmma_wait<0>();
      keep_registers(x);
      if (b + 1 == end_block) release(q_free);
      if (copied && tile.end - b * kBlock < kBlock) {
        for (int p = 0; p < kLatentPanels - 1; ++p)
          clear_keys<256>(keys_at(p), tile.end - b * kBlock, static_cast<int>(threadIdx.x));
        fence_async_shared();
      }

      // 2. Softmax. The barrier also says that nobody reads the last panel any more.
      const int seen = tile.first_end - b * kBlock;  // of this block, by the first token
      float corr[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int last = min(seen + token[h], tile.end - b * kBlock) - 1 - group * 64;  // column
        float top = kNone;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (last < 63) {
            if (8 * j + 2 * t > last) x[4 * j + 2 * h] = kNone;
            if (8 * j + 2 * t + 1 > last) x[4 * j + 2 * h + 1] = kNone;
          }
          top = fmaxf(top, fmaxf(x[4 * j + 2 * h], x[4 * j + 2 * h + 1]));
        }
        top = quad_max(top);
        if (t == 0) highest[group * kLatentRows + row[h]] = top;
      }
      named_sync(1, 256);
      // Whoever read them for the tile before has come to this barrier since.
      if (several && b == first_block) broken.clear(static_cast<int>(threadIdx.x));
      if (several && seen < kBlock) {
        broken.check(keys_at(0), max(seen, 0), min(tile.end - b * kBlock, kBlock), seen,
                     static_cast<int>(threadIdx.x));
        fence_async_shared();
      }
      float pair[2][8];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float top = fmaxf(m[h], fmaxf(highest[row[h]], highest[kLatentRows + row[h]]));
        const float top_c = top * c;
        corr[h] = softmax_exp2(mc[h] - top_c);
        m[h] = top;
        mc[h] = top_c;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float& y = x[4 * j + 2 * h];
          float& z = x[4 * j + 2 * h + 1];
          y = softmax_exp2(numerics::fma(y, c, -top_c));
          z = softmax_exp2(numerics::fma(z, c, -top_c));
          pair[h][j] = y + z;
          if (group == 0) pairs[(j * kLatentRows + row[h]) * 4 + t] = pair[h][j];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        store_matrix_x4(operand_at(p_at, warp, lane, group * 4 + i),
                        pack_bf16(x[8 * i], x[8 * i + 1]), pack_bf16(x[8 * i + 2], x[8 * i + 3]),
                        pack_bf16(x[8 * i + 4], x[8 * i + 5]),
                        pack_bf16(x[8 * i + 6], x[8 * i + 7]));
      named_sync(2, 256);
      std::uint32_t p[8][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) load_matrix_x4(operand_at(p_at, warp, lane, i), p[i]);
      if (n.panels == kLatentPanels) {
        fence_async_shared();
        release(free(kLatentPanels - 1));
      }

      // 3. Output: panels group, group + 2, ..
      if (__any_sync(0xFFFFFFFFu, corr[0] != 1.0f || corr[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int e = 0; e < 32; ++e) o[i][e] = o[i][e] * corr[e / 2 % 2];
      }
      const auto done = [&](int i) {
        keep_registers(o[i]);
        const int panel = 2 * i + group;
        if (panel < n.panels) release(free(panel));
      };
      // A warp that issues products waits for those before them; so the panel before is released
      // between the first and the second step of the next one.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        keep_registers(o[i]);
        wgmma_fence();
#pragma unroll
        for (std::uint32_t k = 0; k < 8; ++k) {
          wgmma_bf16<Major::kMn>(o[i], p[k], operand_128b(keys_at(2 * i + group) + k * 2048), true);
          if (k > 0) continue;
          wgmma_commit();
          if (i == 0) continue;
          wgmma_wait<1>();
          done(i - 1);
        }
        wgmma_commit();
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (group == 0) continue;
        l[h] = l[h] * corr[h];
#pragma unroll
        for (int j = 0; j < 8; ++j) l[h] = l[h] + pairs[(j * kLatentRows + row[h]) * 4 + t];
#pragma unroll
        for (int j = 0; j < 8; ++j) l[h] = l[h] + pair[h][j];
      }
      wgmma_wait<0>();
      done(3);
#pragma unroll
      for (auto& y : p) keep_registers(y);
      if (b + 1 != end_block && (b + 1) % kSplitBlocks != 0) continue;

        // 4. The end of a split.
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (group == 0) continue;
        const float total = quad_total(l[h]);
        if (t == 0) totals[row[h]] = total;
      }
      named_sync(1, 256);
      const bool whole = tile.end <= kSplit, is_first = kSplits || b < kSplitBlocks;
      float y[2] = {1.0f, 1.0f}, z[2] = {1.0f, 1.0f};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float total = totals[row[h]];
        if (is_first) {
          merged_m[h] = m[h];
          merged_l[h] = total;
        } else {
          merge(c, m[h], total, &merged_m[h], &merged_l[h], &y[h], &z[h]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int e = 0; e < 32; e += 4) {
          float* v = &o[i][e];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            v[k] = v[k] + (v[k] - v[k]);
            if (several)
              v[k] = broken.value(v[k], token[k / 2], (2 * i + group) * 64 + 2 * e + 2 * t + k % 2);
          }
          if (kSplits || whole) continue;
          float4* state =
              states.merged + (std::int64_t{blockIdx.x} * 32 + i * 8 + e / 4) * 256 + threadIdx.x;
          if (!is_first) {
            const float4 old = *state;
            v[0] = numerics::fma(old.x, y[0], v[0] * z[0]);
            v[1] = numerics::fma(old.y, y[0], v[1] * z[0]);
            v[2] = numerics::fma(old.z, y[1], v[2] * z[1]);
            v[3] = numerics::fma(old.w, y[1], v[3] * z[1]);
          }
          if (b + 1 != end_block) *state = make_float4(v[0], v[1], v[2], v[3]);
        }
    }

    // 5. Out, or the split's state.
    const bool part = kSplits && tile.end > kSplit;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (row[h] >= tile.rows) continue;
      const std::int64_t place = tile.token * a.heads + tile.head + row[h];
      const std::int64_t state = item * kLatentRows + row[h];
      const float inverse = 1.0f / merged_l[h];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int column = (2 * i + group) * 64 + 8 * j + 2 * t;
          if (column >= a.value_width) continue;
          const float v = o[i][4 * j + 2 * h], w = o[i][4 * j + 2 * h + 1];
          if (part)
            *reinterpret_cast<float2*>(states.o + state * a.value_width + column) = {v, w};
          else
            *reinterpret_cast<std::uint32_t*>(a.out + place * a.value_width + column) =
                pack_bf16(v * inverse, w * inverse);
        }
      if (group != 0 || t != 0) continue;
      if (part) {
        states.m[state] = merged_m[h];
        states.l[state] = merged_l[h];
      } else if (a.lse2 != nullptr) {
        a.lse2[place] = log_sum2(c, merged_m[h], merged_l[h]);
      }
    }
  }
}

// The splits of a row in ascending order; a CTA a row.
template <int kMergeThreads>
__global__ void __launch_bounds__(kMergeThreads)
    latent_merge_kernel(AttentionArgs a, float c, LatentShape n, LatentStates states) {
  LatentTile tile;
  const int row = static_cast<int>(blockIdx.y);
  if (!tile.locate(a, n, blockIdx.x) || row >= tile.rows || tile.end <= kSplit) return;
  const int splits = (tile.end + kSplit - 1) / kSplit, Kv = static_cast<int>(a.value_width);
  const std::int64_t place = tile.token * a.heads + tile.head + row;
  const auto state = [&](int split) { return (split * n.tiles + blockIdx.x) * kLatentRows + row; };
  for (int d = static_cast<int>(threadIdx.x); d < Kv; d += kMergeThreads) {
    float m = states.m[state(0)], l = states.l[state(0)], o = states.o[state(0) * Kv + d];
    for (int split = 1; split < splits; ++split) {
      float y, z;
      merge(c, states.m[state(split)], states.l[state(split)], &m, &l, &y, &z);
      o = numerics::fma(o, y, states.o[state(split) * Kv + d] * z);
    }
    a.out[place * Kv + d] = numerics::to_bf16(o * (1.0f / l));
    if (d == 0 && a.lse2 != nullptr) a.lse2[place] = log_sum2(c, m, l);
  }
}

}  // namespace lockstep::ops::cuda

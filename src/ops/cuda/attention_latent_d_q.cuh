// dQ of latent attention (docs/numerics.md, section 8), on the forward's tiles of 64 rows. Panels
// of a key block pass twice through a ring: once for the scores and for dp, where both warpgroups
// have 64 of the 128 keys, and once for ds k, where they have every other panel of dQ and halves of
// the last one.
#pragma once

#include "ops/cuda/attention_latent_parts.cuh"

namespace lockstep::ops::cuda {

// delta of every (token, head): a warp each.
template <int kDeltaThreads>
__global__ void __launch_bounds__(kDeltaThreads)
    latent_delta_kernel(const Bf16* d_out, const Bf16* out, std::int64_t count, int Kv,
                        float* delta_TH) {
  const std::int64_t row =
      std::int64_t{blockIdx.x} * (kDeltaThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (row >= count) return;
  float acc = 0;
  for (int first = static_cast<int>(threadIdx.x) % 32 * 8; first < Kv; first += 256) {
    const uint4 x = *reinterpret_cast<const uint4*>(d_out + row * Kv + first);
    const uint4 y = *reinterpret_cast<const uint4*>(out + row * Kv + first);
    const unsigned xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc =
          numerics::fma(numerics::bits_float(xs[i] << 16), numerics::bits_float(ys[i] << 16), acc);
      acc = numerics::fma(numerics::bits_float(xs[i] & 0xFFFF0000u),
                          numerics::bits_float(ys[i] & 0xFFFF0000u), acc);
    }
  }
  acc = butterfly_sum(acc);
  if (threadIdx.x % 32 == 0) delta_TH[row] = acc;
}

struct LatentQueryPlan {
  static constexpr int kStages = 4;
  static constexpr int kQ = 0;
  static constexpr int kOut = kLatentPanels * kRowPanelBytes;
  static constexpr int kKeys = kOut + (kLatentPanels - 1) * kRowPanelBytes;
  static constexpr int kDs = kKeys + kStages * kKeyPanelBytes;  // [64, 128]
  static constexpr int kBarriers = kDs + 2 * kRowPanelBytes;
  static constexpr int kBytes = 1024 + kBarriers + (2 + 2 * kStages) * 8;
  static_assert(kBytes <= kSharedMemory);
};

__global__ void __launch_bounds__(kLatentThreads, 1)
    latent_d_q_kernel(AttentionArgs a, float c, LatentShape n, const float* delta_TH,
                      const __grid_constant__ CUtensorMap q_map,
                      const __grid_constant__ CUtensorMap out_map,
                      const __grid_constant__ CUtensorMap k_map) {
  using Plan = LatentQueryPlan;
  constexpr int kStages = Plan::kStages;
  extern __shared__ unsigned char unaligned[];
  const std::uint32_t base = (shared_address(unaligned) + 1023) & ~1023u;
  const std::uint32_t rows_full = base + Plan::kBarriers, rows_free = rows_full + 8;
  const auto full = [&](int stage) {
    return rows_full + 16 + static_cast<std::uint32_t>(stage * 16);
  };
  const auto free = [&](int stage) { return full(stage) + 8; };
  const auto keys_at = [&](int stage) {
    return base + static_cast<std::uint32_t>(Plan::kKeys + stage * kKeyPanelBytes);
  };
  const auto q_at = [&](int panel) {
    return base + static_cast<std::uint32_t>(Plan::kQ + panel * kRowPanelBytes);
  };
  const auto out_at = [&](int panel) {
    return base + static_cast<std::uint32_t>(Plan::kOut + panel * kRowPanelBytes);
  };
  if (threadIdx.x == 0) {
    mbarrier_init(rows_full, 1);
    mbarrier_init(rows_free, 8);
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full(i), 4);
      mbarrier_init(free(i), 8);
    }
    fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = warpgroup_index();
  const int lane = static_cast<int>(threadIdx.x) % 32,
            warp = static_cast<int>(threadIdx.x) / 32 % 4;
  const int value_panels = (static_cast<int>(a.value_width) + 63) / 64;
  const bool copied = n.piece >= 8;
  std::uint32_t rows_parity = 0;
  RingPosition<kStages> at;
  LatentTile tile;

  if (warpgroup == 2) {
    give_registers<40>();
    for (std::int64_t item = blockIdx.x; item < n.tiles; item += gridDim.x) {
      if (!tile.locate(a, n, item)) continue;
      if (warp == 0 && lane == 0) {
        mbarrier_wait(rows_free, rows_parity ^ 1);
        mbarrier_arrive_expect(
            rows_full, static_cast<std::uint32_t>((n.panels + value_panels) * kRowPanelBytes));
        const int row = static_cast<int>(tile.token * a.heads) + tile.head;
        for (int p = 0; p < n.panels; ++p) tma_load_2d(q_at(p), &q_map, rows_full, p * 64, row);
        for (int p = 0; p < value_panels; ++p)
          tma_load_2d(out_at(p), &out_map, rows_full, p * 64, row);
      }
      rows_parity ^= 1;
      __syncwarp();
      const int blocks = (tile.end + kBlock - 1) / kBlock;
      for (int b = 0; b < blocks; ++b) {
        const int from = copied ? piece_row(a, tile, b * kBlock, warp, n.piece) : 0;
        // Copies of 16 bytes are told of two panels later.
        constexpr int kLag = 2;
        RingPosition<kStages> told = at;
        const auto tell = [&] {
          fence_async_shared();
          __syncwarp();
          if (lane == 0) mbarrier_arrive(full(told.stage));
          told.advance();
        };
        for (int i = 0; i < 2 * n.panels; ++i, at.advance()) {
          mbarrier_wait(free(at.stage), at.parity ^ 1);
          load_key_panel(a, tile, b * kBlock, i % n.panels, keys_at(at.stage), warp, n.piece,
                         copied, from, &k_map, full(at.stage));
          if (copied) continue;
          copy_commit();
          copy_wait<kLag>();
          if (i >= kLag) tell();
        }
        if (copied) continue;
        copy_wait<0>();
        for (int i = 0; i < kLag && i < 2 * n.panels; ++i) tell();
      }
    }
    return;
  }

  take_registers<232>();
  const int group = warpgroup, t = lane % 4;
  const int row[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
  const std::uint32_t ds_at = base + Plan::kDs;
  const auto release = [&](std::uint32_t barrier) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  };
  const auto scale = static_cast<float>(a.scale);
  for (std::int64_t item = blockIdx.x; item < n.tiles; item += gridDim.x) {
    if (!tile.locate(a, n, item)) continue;
    const std::int64_t head = tile.token * a.heads + tile.head;
    float lse2[2], delta[2];
    int ends[2];  // of the keys that a row sees
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = min(row[h], tile.rows - 1);
      ends[h] = tile.first_end + tile.index(r);
      lse2[h] = a.lse2[head + r];
      delta[h] = delta_TH[head + r];
    }
    mbarrier_wait(rows_full, rows_parity);
    rows_parity ^= 1;
    float d_q[4][32] = {}, d_last[16] = {};
    const int blocks = (tile.end + kBlock - 1) / kBlock;
    for (int b = 0; b < blocks; ++b) {
      // 1. Scores and dp of the warpgroup's 64 keys.
      float x[32] = {}, dp[32] = {};
      for (int p = 0; p < n.panels; ++p, at.advance()) {
        mbarrier_wait(full(at.stage), at.parity);
        const std::uint32_t k = keys_at(at.stage) + static_cast<std::uint32_t>(group * 64 * 128);
        keep_registers(x);
        keep_registers(dp);
        wgmma_fence();
#pragma unroll
        for (std::uint32_t d = 0; d < 4; ++d)
          wgmma_bf16<Major::kK, Major::kK>(x, operand_128b(q_at(p) + d * 32),
                                           operand_128b(k + d * 32), true);
        if (p < value_panels) {
#pragma unroll
          for (std::uint32_t d = 0; d < 4; ++d)
            wgmma_bf16<Major::kK, Major::kK>(dp, operand_128b(out_at(p) + d * 32),
                                             operand_128b(k + d * 32), true);
        }
        wgmma_commit();
        wgmma_wait<0>();
        keep_registers(x);
        keep_registers(dp);
        release(free(at.stage));
      }
      if (b + 1 == blocks) release(rows_free);

      // 2. ds.
      const int first_key = b * kBlock + group * 64 + 2 * t;
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int h = i / 2 % 2, key = first_key + i / 4 * 8 + i % 2;
        const float p = softmax_exp2(numerics::fma(x[i], c, -lse2[h]));
        x[i] = key < ends[h] ? p * (dp[i] - delta[h]) : 0.0f;
      }
      named_sync(1, 256);  // the block before is done with its ds
#pragma unroll
      for (int i = 0; i < 4; ++i)
        store_matrix_x4(operand_at(ds_at, warp, lane, group * 4 + i),
                        pack_bf16(x[8 * i], x[8 * i + 1]), pack_bf16(x[8 * i + 2], x[8 * i + 3]),
                        pack_bf16(x[8 * i + 4], x[8 * i + 5]),
                        pack_bf16(x[8 * i + 6], x[8 * i + 7]));
      fence_async_shared();
      named_sync(2, 256);

      // 3. ds k, panel by panel.
      const auto wait_keys = [&](bool mine) {
        mbarrier_wait(full(at.stage), at.parity);
        if (!mine || !copied || tile.end - b * kBlock >= kBlock) return;
        clear_keys<128>(keys_at(at.stage), tile.end - b * kBlock,
                        static_cast<int>(threadIdx.x) % 128);
        fence_async_shared();
        named_sync(3 + group, 128);
      };
      const auto ds = [&](std::uint32_t k) {
        return operand_128b(ds_at + k / 4 * kRowPanelBytes + k % 4 * 32);
      };
#pragma unroll
      for (int p = 0; p < kLatentPanels - 1; ++p) {
        if (p >= n.panels) continue;
        wait_keys(p % 2 == group);
        if (p % 2 == group) {
          float part[32];
          wgmma_fence();
#pragma unroll
          for (std::uint32_t k = 0; k < 8; ++k)
            wgmma_bf16<Major::kK, Major::kMn>(part, ds(k),
                                              operand_128b(keys_at(at.stage) + k * 2048), k > 0);
          wgmma_commit();
          wgmma_wait<0>();
          keep_registers(part);
#pragma unroll
          for (int i = 0; i < 32; ++i) d_q[p / 2][i] = d_q[p / 2][i] + part[i];
        }
        release(free(at.stage));
        at.advance();
      }
      if (n.panels == kLatentPanels) {
        wait_keys(true);
        float part[16];
        wgmma_fence();
#pragma unroll
        for (std::uint32_t k = 0; k < 8; ++k)
          wgmma_bf16<Major::kK, Major::kMn>(
              part, ds(k),
              operand_128b(keys_at(at.stage) + k * 2048 + static_cast<std::uint32_t>(group * 64)),
              k > 0);
        wgmma_commit();
        wgmma_wait<0>();
        keep_registers(part);
#pragma unroll
        for (int i = 0; i < 16; ++i) d_last[i] = d_last[i] + part[i];
        release(free(at.stage));
        at.advance();
      }
    }

#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (row[h] >= tile.rows) continue;
      Bf16* to = a.d_q + (head + row[h]) * a.width;
      const auto store = [&](int column, float x, float y) {
        if (column < a.width)
          *reinterpret_cast<std::uint32_t*>(to + column) = pack_bf16(x * scale, y * scale);
      };
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j)
          store((2 * i + group) * 64 + 8 * j + 2 * t, d_q[i][4 * j + 2 * h],
                d_q[i][4 * j + 2 * h + 1]);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        store(512 + group * 32 + 8 * j + 2 * t, d_last[4 * j + 2 * h], d_last[4 * j + 2 * h + 1]);
    }
  }
}

}  // namespace lockstep::ops::cuda

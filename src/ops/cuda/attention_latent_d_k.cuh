// The gradient of latent attention's key rows (docs/numerics.md, section 8): what they get as
// values (kKeys false), which stays in the workspace, then what they get as keys, and the sum of
// both. A CTA has 64 keys and one query head; tiles of 64 queries stream through. Scores are
// computed transposed, each warpgroup those of 32 queries; each has every other panel of the result
// and half of the last. The heads of a group add onto one another in ascending order: a CTA takes
// its turn when the one of the head before is done. Work is handed out by a counter, heads
// ascending, so that whoever is waited for has been running already.
#pragma once

#include "ops/cuda/attention_latent_parts.cuh"

namespace lockstep::ops::cuda {

struct LatentKeyPlan {
  static constexpr int kK = 0;
  static constexpr int kQ = kLatentPanels * kRowPanelBytes;
  static constexpr int kOut = 2 * kLatentPanels * kRowPanelBytes;
  static constexpr int kP = kOut + (kLatentPanels - 1) * kRowPanelBytes;  // two, [64, 64] each
  static constexpr int kBarriers = kP + 2 * kRowPanelBytes;
  static constexpr int kStreams = 2 * kLatentPanels - 1;  // panels of q, then those of dO
  static constexpr int kTicket = kBarriers + 8 + kStreams * 16;
  static constexpr int kBytes = 1024 + kTicket + 8;
  static constexpr int kLoadRows = kLatentRows / 4;  // of a tile, each warp that loads
  static_assert(kBytes <= kSharedMemory);
};

// Key tiles of all sequences: that of sequence s and its keys 64 i .. is begin / 64 + s + i.
inline std::int64_t latent_slots(std::int64_t tokens, std::int64_t sequences) {
  return tokens / kLatentRows + sequences;
}
__device__ inline bool locate_slot(const AttentionArgs& a, int slot, Sequence* seq, int* first) {
  int low = 0, high = static_cast<int>(a.sequences) - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (a.q_offsets[middle] / kLatentRows + middle <= slot)
      low = middle;
    else
      high = middle - 1;
  }
  *seq = Sequence(a, low);
  *first = (slot - static_cast<int>(seq->begin) / kLatentRows - low) * kLatentRows;
  return *first >= 0 && *first < seq->queries;
}

// In the workspace, all [slots * J]: sums of values [.., 32, 256] and keys [.., 36, 256], a
// thread's values as it holds them, and whose turn it is. `ticket` and the turns start at 0.
struct LatentSums {
  float4 *values, *keys;
  int *ticket, *turns;
  int slots;
};

__device__ inline int acquire_turn(const int* turn) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(turn) : "memory");
  return value;
}

template <bool kKeys>
__global__ void __launch_bounds__(kLatentThreads, 1)
    latent_d_k_kernel(AttentionArgs a, float c, const float* delta_TH, LatentSums sums,
                      const __grid_constant__ CUtensorMap q_map,
                      const __grid_constant__ CUtensorMap out_map,
                      const __grid_constant__ CUtensorMap k_map) {
  using Plan = LatentKeyPlan;
  extern __shared__ unsigned char unaligned[];
  const std::uint32_t start = shared_address(unaligned), base = (start + 1023) & ~1023u;
  int* const ticket = reinterpret_cast<int*>(unaligned + (base - start) + Plan::kTicket);
  const std::uint32_t k_full = base + Plan::kBarriers;
  const auto full = [&](int stream) {
    return k_full + 8 + static_cast<std::uint32_t>(stream * 16);
  };
  const auto free = [&](int stream) { return full(stream) + 8; };
  const auto k_at = [&](int panel) {
    return base + static_cast<std::uint32_t>(Plan::kK + panel * kRowPanelBytes);
  };
  const auto stream_at = [&](int stream) {
    return base + static_cast<std::uint32_t>(Plan::kQ + stream * kRowPanelBytes);
  };
  // A panel is free when all eight warps, or the four whose result it makes, have said so.
  if (threadIdx.x == 0) {
    mbarrier_init(k_full, 1);
    for (int i = 0; i < Plan::kStreams; ++i) {
      const bool query = i < kLatentPanels;
      const bool owned = kKeys ? i < kLatentPanels - 1 : !query;
      mbarrier_init(full(i), 4);
      mbarrier_init(free(i), owned ? 4 : 8);
    }
    fence_barrier_init();
    *ticket = atomicAdd(sums.ticket, 1);
  }
  __syncthreads();

  const int slots = sums.slots, J = static_cast<int>(a.kv_heads);
  const int group = static_cast<int>(a.heads) / J;
  const int g = *ticket / (slots * J), place = *ticket % (slots * J);
  const int j = place % J, h = j * group + g;
  Sequence seq;
  int first = 0;
  if (g >= group || !locate_slot(a, place / J, &seq, &first)) return;
  const int queries = seq.queries;
  const int tiles = (queries - first + kLatentRows - 1) / kLatentRows;
  const int panels = (static_cast<int>(a.width) + 63) / 64,
            value_panels = (static_cast<int>(a.value_width) + 63) / 64;
  const int warpgroup = warpgroup_index();
  const int lane = static_cast<int>(threadIdx.x) % 32,
            warp = static_cast<int>(threadIdx.x) / 32 % 4;
  std::uint32_t parity = 0;

  if (warpgroup == 2) {
    give_registers<40>();
    if (warp == 0 && lane == 0) {
      mbarrier_arrive_expect(k_full, static_cast<std::uint32_t>(panels * kRowPanelBytes));
      for (int p = 0; p < panels; ++p)
        tma_load_3d(k_at(p), &k_map, k_full, p * 64, j, static_cast<int>(seq.begin) + first);
    }
    __syncwarp();
    // Panel `panel` of q or dO: 16 rows a warp.
    const auto load = [&](bool query, int panel, int tile_row, bool whole) {
      const int stream = query ? panel : kLatentPanels + panel;
      const int row = tile_row + warp * Plan::kLoadRows;
      const std::uint32_t to =
          stream_at(stream) + static_cast<std::uint32_t>(warp * Plan::kLoadRows * 128);
      mbarrier_wait(free(stream), parity ^ 1);
      if (whole) {
        if (lane == 0) {
          mbarrier_arrive_expect(full(stream), Plan::kLoadRows * 128);
          tma_load_3d(to, query ? &q_map : &out_map, full(stream), panel * 64, h,
                      static_cast<int>(seq.begin) + row);
        }
        __syncwarp();
        return;
      }
      const std::int64_t width = query ? a.width : a.value_width;
      const Bf16* from = query ? a.q : a.d_out;
      const int chunk = lane % 8, column = panel * 64 + chunk * 8;
#pragma unroll
      for (int r = lane / 8; r < Plan::kLoadRows; r += 4) {
        const bool present = row + r < queries && column < width;
        const std::int64_t at = ((seq.begin + row + r) * a.heads + h) * width + column;
        copy_async(panel_at<kRowPanelBytes>(to, r, chunk), from + (present ? at : 0), present);
      }
    };
    for (int i = 0; i < tiles; ++i, parity ^= 1) {
      const int row = first + i * kLatentRows;
      const bool whole = row + kLatentRows <= queries;
      for (int p = 0; p < value_panels && kKeys; ++p) load(false, p, row, whole);
      for (int p = 0; p < panels; ++p) load(true, p, row, whole);
      for (int p = 0; p < value_panels && !kKeys; ++p) load(false, p, row, whole);
      if (whole) continue;
      finish_last_rows();
      for (int p = 0; p < panels && lane == 0; ++p) mbarrier_arrive(full(p));
      for (int p = 0; p < value_panels && lane == 0; ++p) mbarrier_arrive(full(kLatentPanels + p));
      __syncwarp();
    }
    return;
  }

  take_registers<232>();
  const int side = warpgroup, t = lane % 4;
  const int key[2] = {first + warp * 16 + lane / 4, first + warp * 16 + lane / 4 + 8};
  const auto release = [&](std::uint32_t barrier) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  };
  // k (or its values) times 32 rows of a stream's panels.
  const auto multiply = [&](float(&x)[16], int stream, int count) {
    for (int p = 0; p < count; ++p) {
      mbarrier_wait(full(stream + p), parity);
      const std::uint32_t rows =
          stream_at(stream + p) + static_cast<std::uint32_t>(side * 32 * 128);
      keep_registers(x);
      wgmma_fence();
#pragma unroll
      for (std::uint32_t d = 0; d < 4; ++d)
        wgmma_bf16<Major::kK, Major::kK>(x, operand_128b(k_at(p) + d * 32),
                                         operand_128b(rows + d * 32), true);
      wgmma_commit();
      keep_registers(x);
    }
  };
  float acc[4][32] = {}, acc_last[16] = {};
  mbarrier_wait(k_full, 0);
  for (int i = 0; i < tiles; ++i, parity ^= 1) {
    const int query = first + i * kLatentRows + side * 32 + 2 * t;  // and + 8 n, + 1
    float lse2[8], delta[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int row = min(query + e / 2 * 8 + e % 2, queries - 1);
      const std::int64_t at = (seq.begin + row) * a.heads + h;
      lse2[e] = __ldg(a.lse2 + at);
      if (kKeys) delta[e] = __ldg(delta_TH + at);
    }
    float x[16] = {}, dp[16] = {};
    if (kKeys) {
      multiply(dp, kLatentPanels, value_panels);
      wgmma_wait<0>();
      keep_registers(dp);
      for (int p = 0; p < value_panels; ++p) release(free(kLatentPanels + p));
    }
    multiply(x, 0, panels);
    wgmma_wait<0>();
    keep_registers(x);
    if (!kKeys)
      for (int p = 0; p < panels; ++p) release(free(p));
#pragma unroll
    for (int e = 0; e < 16; ++e) {
      const int column = e / 4 * 2 + e % 2, row = query + e / 4 * 8 + e % 2;
      const bool seen = row < queries && key[e / 2 % 2] <= row;
      const float p = softmax_exp2(numerics::fma(x[e], c, -lse2[column]));
      x[e] = !seen ? 0.0f : kKeys ? p * (dp[e] - delta[column]) : p;
    }
    const std::uint32_t p_at = base + Plan::kP + static_cast<std::uint32_t>(i % 2 * kRowPanelBytes);
#pragma unroll
    for (int n = 0; n < 2; ++n)
      store_matrix_x4(operand_at(p_at, warp, lane, side * 2 + n), pack_bf16(x[8 * n], x[8 * n + 1]),
                      pack_bf16(x[8 * n + 2], x[8 * n + 3]), pack_bf16(x[8 * n + 4], x[8 * n + 5]),
                      pack_bf16(x[8 * n + 6], x[8 * n + 7]));
    named_sync(1, 256);
    std::uint32_t p[4][4];
#pragma unroll
    for (int n = 0; n < 4; ++n) load_matrix_x4(operand_at(p_at, warp, lane, n), p[n]);

    constexpr int kFrom = kKeys ? 0 : kLatentPanels;  // the streams that are multiplied now
    const int count = kKeys ? panels : value_panels;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int panel = 2 * n + side;
      if (!kKeys && panel < count) mbarrier_wait(full(kFrom + panel), parity);
      keep_registers(acc[n]);
      wgmma_fence();
#pragma unroll
      for (std::uint32_t k = 0; k < 4; ++k)
        wgmma_bf16<Major::kMn>(acc[n], p[k], operand_128b(stream_at(kFrom + panel) + k * 2048),
                               true);
      wgmma_commit();
    }
    if (kKeys) {
      keep_registers(acc_last);
      wgmma_fence();
#pragma unroll
      for (std::uint32_t k = 0; k < 4; ++k)
        wgmma_bf16<Major::kMn>(acc_last, p[k],
                               operand_128b(stream_at(kLatentPanels - 1) + k * 2048 +
                                            static_cast<std::uint32_t>(side * 64)),
                               true);
      wgmma_commit();
    }
    const auto done = [&](int n) {
      keep_registers(acc[n]);
      const int panel = 2 * n + side;
      if (panel < count) release(free(kFrom + panel));
    };
    wgmma_wait<kKeys ? 4 : 3>();
    done(0);
    wgmma_wait<kKeys ? 3 : 2>();
    done(1);
    wgmma_wait<kKeys ? 2 : 1>();
    done(2);
    wgmma_wait<kKeys ? 1 : 0>();
    done(3);
    if (kKeys) {
      wgmma_wait<0>();
      keep_registers(acc_last);
      if (panels == kLatentPanels) release(free(kLatentPanels - 1));
    }
#pragma unroll
    for (auto& y : p) keep_registers(y);
  }

  // The heads before have been added, or are being so.
  int* const turn = sums.turns + place;
  if (g > 0) {
    if (threadIdx.x == 0)
      while (acquire_turn(turn) < g) __nanosleep(100);
    named_sync(1, 256);
  }
  constexpr int kVectors = kKeys ? 36 : 32;
  float4* const sum =
      (kKeys ? sums.keys : sums.values) + std::int64_t{place} * kVectors * 256 + threadIdx.x;
  const bool last = g + 1 == group;
  const auto add = [&](float* v, int vector) {
    if (g > 0) {
      const float4 old = __ldcg(sum + vector * 256);
      v[0] = old.x + v[0];
      v[1] = old.y + v[1];
      v[2] = old.z + v[2];
      v[3] = old.w + v[3];
    }
    if (!kKeys || !last) __stcg(sum + vector * 256, make_float4(v[0], v[1], v[2], v[3]));
  };
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int e = 0; e < 32; e += 4) add(&acc[n][e], n * 8 + e / 4);
  if (kKeys) {
#pragma unroll
    for (int e = 0; e < 16; e += 4) add(&acc_last[e], 32 + e / 4);
  }
  if (!last) {
    __threadfence();
    named_sync(1, 256);
    if (threadIdx.x == 0) {
      __threadfence();
      *reinterpret_cast<volatile int*>(turn) = g + 1;
    }
    return;
  }
  if (!kKeys) return;

  const float4* const of_values = sums.values + std::int64_t{place} * 32 * 256 + threadIdx.x;
  const auto scale = static_cast<float>(a.scale);
  const auto store = [&](int r, int column, float x, float y) {
    if (key[r] < queries && column < a.width)
      *reinterpret_cast<std::uint32_t*>(a.d_k + ((seq.begin + key[r]) * J + j) * a.width + column) =
          pack_bf16(x, y);
  };
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int e = 0; e < 32; e += 4) {
      const int column = (2 * n + side) * 64 + 2 * e + 2 * t;
      float4 v = make_float4(0, 0, 0, 0);
      const bool both = column < a.value_width;
      if (both) v = __ldcg(of_values + (n * 8 + e / 4) * 256);
      const float* y = &acc[n][e];
      const auto total = [&](float of_key, float of_value) {
        return both ? of_key * scale + of_value : of_key * scale;
      };
      store(0, column, total(y[0], v.x), total(y[1], v.y));
      store(1, column, total(y[2], v.z), total(y[3], v.w));
    }
#pragma unroll
  for (int e = 0; e < 16; e += 4) {
    const int column = 512 + side * 32 + 2 * e + 2 * t;
    store(0, column, acc_last[e] * scale, acc_last[e + 1] * scale);
    store(1, column, acc_last[e + 2] * scale, acc_last[e + 3] * scale);
  }
}

}  // namespace lockstep::ops::cuda

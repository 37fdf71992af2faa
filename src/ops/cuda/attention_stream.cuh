// Attention forward on wgmma: a CTA has 64 rows a consumer warpgroup (neighbouring positions of one
// query head), a producer warp brings blocks of 128 keys and values by TMA. The scores of a block
// are computed while the block before is multiplied with its values, and its softmax runs under
// that product. Widths 64 and 128, the same for keys and values. A tile whose result is NaN
// somewhere is computed a second time with its values checked, so that one that is not finite
// counts only for the rows that see it.
#pragma once

#include "ops/cuda/attention_panels.cuh"

namespace lockstep::ops::cuda {

template <int kWidth>
struct StreamPlan {
  static constexpr int kGroups = 2;  // consumer warpgroups
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kConsumerRegisters = 240;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kPanels = kWidth / 64;  // of 128 bytes a row
  static constexpr int kStages = 2;
  static constexpr int kQueryBytes = kRows * kWidth * 2;
  static constexpr int kBlockBytes = kBlock * kWidth * 2;
  static constexpr int kPanelBytes = kBlock * 128;
  static constexpr int kBarriers = kQueryBytes + 2 * kStages * kBlockBytes;  // offset
  static constexpr int kRepeat = kBarriers + 120;                            // offset, an int
  static constexpr int kBroken = kBarriers + 128;                            // offset
  static constexpr int kMerged = kBroken + kWidth * 4;                       // offset
  static constexpr int kAlign = 1024;
  static constexpr int bytes(bool several_splits) {
    return kAlign + kMerged + (several_splits ? kRows * kWidth * 4 : 0);
  }
};

struct StreamMaps {
  CUtensorMap q, k, v;  // [width, heads, rows], boxes of 64 columns, one head
};

// The softmax of a block on a wgmma accumulator (section 8): scores become p, the state moves on;
// corr is what O is multiplied by. last[h] is the last column that row h of the thread sees.
struct StreamRows {
  float m[2], mc[2], l[2];
};
template <bool kMasked>
__device__ __forceinline__ void stream_softmax(float (&s)[64], const int (&last)[2], float c,
                                               StreamRows& w, float (&corr)[2]) {
  const int column = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float m[2] = {w.m[h], kNone};
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      float& x = s[4 * j + 2 * h];
      float& y = s[4 * j + 2 * h + 1];
      if (kMasked) {
        if (8 * j + column > last[h]) x = kNone;
        if (8 * j + column + 1 > last[h]) y = kNone;
      }
      m[j % 2] = fmaxf(m[j % 2], fmaxf(x, y));
    }
    const float top = quad_max(fmaxf(m[0], m[1]));
    const float mc = top * c;
    corr[h] = softmax_exp2(w.mc[h] - mc);
    w.m[h] = top;
    w.mc[h] = mc;
    float l = w.l[h] * corr[h];
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      float& x = s[4 * j + 2 * h];
      float& y = s[4 * j + 2 * h + 1];
      x = softmax_exp2(numerics::fma(x, c, -mc));
      y = softmax_exp2(numerics::fma(y, c, -mc));
      l = l + (x + y);
    }
    w.l[h] = l;
  }
}

// p as operand A: four registers a step of 16 keys.
__device__ __forceinline__ void stream_pack(const float (&s)[64], std::uint32_t (&p)[8][4]) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) p[i][e] = pack_bf16(s[8 * i + 2 * e], s[8 * i + 2 * e + 1]);
}

template <int kWidth>
__device__ __forceinline__ void stream_scores(float (&s)[64], std::uint32_t q, std::uint32_t k) {
  using Plan = StreamPlan<kWidth>;
#pragma unroll
  for (int d = 0; d < kWidth / 16; ++d)
    wgmma_bf16<Major::kK, Major::kK>(s, operand_128b(q + d / 4 * Plan::kRows * 128 + d % 4 * 32),
                                     operand_128b(k + d / 4 * Plan::kPanelBytes + d % 4 * 32),
                                     d > 0);
}
template <int kWidth>
__device__ __forceinline__ void stream_values(float (&o)[kWidth / 2],
                                              const std::uint32_t (&p)[8][4], std::uint32_t v,
                                              bool add) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    wgmma_bf16<Major::kMn>(
        o, p[i], operand_128b(v + i * 2048, 1024, StreamPlan<kWidth>::kPanelBytes), add || i > 0);
}

// Pages come in pieces of `piece` rows, which the boxes of k's and v's maps have; at least 8.
template <int kWidth, bool kPaged>
__global__ __launch_bounds__(StreamPlan<kWidth>::kThreads, 1) void attention_stream_kernel(
    AttentionArgs a, float c, int decode_rows, int piece, const __grid_constant__ StreamMaps maps) {
  using Plan = StreamPlan<kWidth>;
  constexpr int kRows = Plan::kRows, kStages = Plan::kStages;
  extern __shared__ unsigned char unaligned[];
  const int s = blockIdx.z, h = blockIdx.y, j = h / static_cast<int>(a.heads / a.kv_heads);
  const Sequence seq(a, s);
  const int tiles = (seq.queries + kRows - 1) / kRows;
  const int group_heads = static_cast<int>(a.heads / a.kv_heads);
  if (static_cast<int>(blockIdx.x) >= tiles || seq.queries * group_heads <= decode_rows) return;
  const int first = (tiles - 1 - static_cast<int>(blockIdx.x)) * kRows;
  const int last = first + kRows < seq.queries ? first + kRows : seq.queries;
  const int end = seq.first_position + last;
  const int blocks = (end + kBlock - 1) / kBlock;

  const std::uint32_t start = shared_address(unaligned);
  const std::uint32_t base = (start + Plan::kAlign - 1) / Plan::kAlign * Plan::kAlign;
  const auto k_at = [&](int stage) { return base + Plan::kQueryBytes + stage * Plan::kBlockBytes; };
  const auto v_at = [&](int stage) { return k_at(kStages + stage); };
  const std::uint32_t q_full = base + Plan::kBarriers;
  const auto k_full = [&](int stage) { return q_full + 8 + stage * 32; };
  const auto k_free = [&](int stage) { return k_full(stage) + 8; };
  const auto v_full = [&](int stage) { return k_full(stage) + 16; };
  const auto v_free = [&](int stage) { return k_full(stage) + 24; };
  const std::uint32_t raw = k_full(kStages);  // values that are not fit for use yet
  const BrokenValues broken{base + Plan::kBroken};
  const std::uint32_t judged = raw + 8;
  volatile int* repeat = reinterpret_cast<int*>(unaligned + (base - start) + Plan::kRepeat);
  broken.clear(kWidth, Plan::kThreads);
  if (threadIdx.x == 0) {
    mbarrier_init(q_full, 1);
    mbarrier_init(raw, 1);
    mbarrier_init(judged, 1);
    *repeat = 0;
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(k_full(i), 1);
      mbarrier_init(v_full(i), 1);
      mbarrier_init(k_free(i), Plan::kGroups);
      mbarrier_init(v_free(i), Plan::kGroups);
    }
    fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  if (warpgroup == 0) {
    give_registers<Plan::kProducerRegisters>();
    if (threadIdx.x >= 32) return;
    const bool leader = threadIdx.x == 0;
    const int row = static_cast<int>(seq.begin);
    // Keys or values of block b.
    const auto load = [&](std::uint32_t to, const CUtensorMap* map, std::uint32_t full, int b) {
      if (leader) mbarrier_arrive_expect(full, Plan::kBlockBytes);
      if (!kPaged && leader)
        for (int panel = 0; panel < Plan::kPanels; ++panel)
          tma_load_3d(to + panel * Plan::kPanelBytes, map, full, panel * 64, j, row + b * kBlock);
      const int at = static_cast<int>(threadIdx.x) * piece;
      if (kPaged && at < kBlock) {
        const int from = key_row(a, seq, s, b * kBlock + at, end);
        for (int panel = 0; panel < Plan::kPanels; ++panel)
          tma_load_3d(to + panel * Plan::kPanelBytes + at * 128, map, full, panel * 64, j,
                      from < 0 ? -kBlock : from);
      }
    };
    if (leader) {
      mbarrier_arrive_expect(q_full, Plan::kQueryBytes);
      for (int panel = 0; panel < Plan::kPanels; ++panel)
        tma_load_3d(base + panel * kRows * 128, &maps.q, q_full, panel * 64, h, row + first);
    }
    std::uint32_t raw_parity = 0;
    for (int i = 0; i < 2 * blocks; ++i) {
      if (i == blocks) {
        mbarrier_wait(judged, 0);
        if (*repeat == 0) return;
      }
      const int b = i % blocks, stage = i % kStages;
      const std::uint32_t parity = static_cast<std::uint32_t>(i / kStages % 2) ^ 1u;
      mbarrier_wait(k_free(stage), parity);
      load(k_at(stage), &maps.k, k_full(stage), b);
      mbarrier_wait(v_free(stage), parity);
      // Values from here on are not used as they come: those that no row sees, or not all rows.
      const int from = (i < blocks ? seq.keys : seq.first_position + first + 1) - b * kBlock;
      load(v_at(stage), &maps.v, from < kBlock ? raw : v_full(stage), b);
      if (from < kBlock) {
        mbarrier_wait(raw, raw_parity);
        raw_parity ^= 1;
        check_values<Plan::kPanels>(v_at(stage), from, b * kBlock, end, broken);
        fence_async_shared();
        __syncwarp();
        if (leader) mbarrier_arrive(v_full(stage));
      }
      __syncwarp();
    }
    return;
  }

  take_registers<Plan::kConsumerRegisters>();
  const int group = warpgroup - 1, thread = static_cast<int>(threadIdx.x) - 128;
  const int lane = thread % 32, warp = thread / 32 % 4;
  const bool signals = thread % 128 == 0;
  const std::uint32_t q = base + group * 64 * 128;
  float* merged = reinterpret_cast<float*>(unaligned + (base - start) + Plan::kMerged) + thread;
  const int row = first + group * 64 + warp * 16 + lane / 4;  // and row + 8
  const int position[2] = {seq.first_position + row, seq.first_position + row + 8};
  const int lowest = seq.first_position + first + group * 64;
  int done = 0;  // blocks of the first time
  const auto scores = [&](float(&x)[64], int b) {
    const int i = done + b;
    mbarrier_wait(k_full(i % kStages), static_cast<std::uint32_t>(i / kStages % 2));
    wgmma_fence();
    stream_scores<kWidth>(x, q, k_at(i % kStages));
    wgmma_commit();
  };
  float o[kWidth / 2];
  const auto values = [&](const std::uint32_t(&p)[8][4], int b, bool add) {
    const int i = done + b;
    mbarrier_wait(v_full(i % kStages), static_cast<std::uint32_t>(i / kStages % 2));
    wgmma_fence();
    stream_values<kWidth>(o, p, v_at(i % kStages), add);
    wgmma_commit();
  };
  const auto softmax = [&](float(&x)[64], int b, StreamRows& w, float(&corr)[2]) {
    const int seen[2] = {position[0] - b * kBlock, position[1] - b * kBlock};
    if (b * kBlock + kBlock - 1 > lowest)
      stream_softmax<true>(x, seen, c, w, corr);
    else
      stream_softmax<false>(x, seen, c, w, corr);
  };
  const auto release_keys = [&](int b) {
    if (signals) mbarrier_arrive(k_free((done + b) % kStages));
  };
  const auto release_values = [&](int b) {
    if (signals) mbarrier_arrive(v_free((done + b) % kStages));
  };

  float merged_m[2], merged_l[2];
  mbarrier_wait(q_full, 0);
  constexpr int kSplitBlocks = kSplit / kBlock;
  while (true) {
    for (int split = 0; split < blocks; split += kSplitBlocks) {
      const int split_end = split + kSplitBlocks < blocks ? split + kSplitBlocks : blocks;
      StreamRows w{{kNone, kNone}, {kNone, kNone}, {0, 0}};
      float x[64], corr[2];
      std::uint32_t p[8][4];
      scores(x, split);
      wgmma_wait<0>();
      keep_registers(x);
      release_keys(split);
      softmax(x, split, w, corr);
      stream_pack(x, p);
      for (int b = split; b + 1 < split_end; ++b) {
        scores(x, b + 1);
        values(p, b, b > split);
        wgmma_wait<1>();
        keep_registers(x);
        release_keys(b + 1);
        softmax(x, b + 1, w, corr);
        wgmma_wait<0>();
        keep_registers(o);
        release_values(b);
#pragma unroll
        for (int i = 0; i < kWidth / 2; ++i) o[i] = o[i] * corr[i / 2 % 2];
        stream_pack(x, p);
      }
      values(p, split_end - 1, split_end - 1 > split);
      wgmma_wait<0>();
      keep_registers(o);
      release_values(split_end - 1);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float l = quad_total(w.l[r]);
        const bool seen = position[r] >= split * kBlock;
        float y = 1, z = 1;
        if (split == 0) {
          merged_m[r] = w.m[r];
          merged_l[r] = l;
        } else if (seen) {
          merge(c, w.m[r], l, &merged_m[r], &merged_l[r], &y, &z);
        }
#pragma unroll
        for (int i = 0; i < kWidth / 2; ++i) {
          if (i / 2 % 2 != r) continue;
          o[i] = o[i] + (o[i] - o[i]);
          if (blocks <= kSplitBlocks) continue;
          float* state = merged + i * 128 * Plan::kGroups;
          if (split > 0) o[i] = seen ? numerics::fma(*state, y, o[i] * z) : *state;
          *state = o[i];
        }
      }
    }

    if (done > 0) break;
    bool nan = false;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i)
      nan = nan || (o[i] != o[i] && row + i / 2 % 2 * 8 < seq.queries);
    if (nan) *repeat = 1;
    constexpr int kTogether = 1 + Plan::kGroups;
    named_sync(kTogether, 128 * Plan::kGroups);
    if (thread == 0) mbarrier_arrive(judged);
    if (*repeat == 0) break;
    done = blocks;
  }

  if (done > 0)
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i)
      o[i] = broken.value(o[i], position[i / 2 % 2], i / 4 * 8 + lane % 4 * 2 + i % 2);
  // Through this warp's rows of q in shared memory, which nobody reads any more, 16 bytes a thread
  // to memory.
  const float inverse[2] = {1.0f / merged_l[0], 1.0f / merged_l[1]};
  named_sync(1 + group, 128);
  store_rows<kWidth, kRows * 128>(o, inverse, q, a.out + (seq.begin * a.heads + h) * kWidth,
                                  a.heads * kWidth, first + group * 64, seq.queries);
  if (a.lse2 == nullptr || lane % 4 != 0) return;
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (row + 8 * r < seq.queries)
      a.lse2[(seq.begin + row + 8 * r) * a.heads + h] = log_sum2(c, merged_m[r], merged_l[r]);
}

}  // namespace lockstep::ops::cuda

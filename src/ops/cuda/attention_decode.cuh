// Attention of sequences with few rows (queries times query heads of a group, up to 16), as decode
// has them: a CTA takes one split of 2048 keys of one sequence and KV head. Its four warps share
// the 16 rows: each has a quarter of a block's keys in q k, and a quarter of the value width in p
// v. What a split leaves is merged in split order by a second kernel; a sequence of one split is
// finished here.
#pragma once

#include "ops/cuda/attention_parts.cuh"

namespace lockstep::ops::cuda {

inline constexpr int kWarps = kThreads / 32;

// States of splits in the workspace: [S, J, splits, rows].
struct SplitStates {
  float* m;
  float* l;
  float* o;  // [.., Kv]
  int splits, rows;
  int most_queries;  // of the sequences that are here

  __device__ std::int64_t at(const AttentionArgs& a, int s, int j, int split, int row) const {
    return ((s * a.kv_heads + j) * splits + split) * rows + row;
  }
};

struct DecodeShared {
  static constexpr int kPairStride = 4 * (kBlock / 8) + 4;
  int rows, broken, q, p, pairs, highest, total, ring, bytes;  // offsets

  __host__ __device__ DecodeShared(int width, int slots) {
    rows = 0;
    broken = rows + kSplit * 4;
    q = broken + width * 4;
    p = q + kDecodeRows * (width + 8) * 2;
    pairs = p + kDecodeRows * (kBlock + 8) * 2;
    highest = pairs + kDecodeRows * kPairStride * 4;
    total = highest + kWarps * kDecodeRows * 4;
    ring = total + kDecodeRows * 4;
    bytes = ring + slots * kBlock * (width + 8) * 2;
  }
};

// Writes what one split left: the output where it is the only one, else the split's state.
template <int kTiles>
__device__ inline void finish_split(const AttentionArgs& a, float c, const SplitStates& states,
                                    const Sequence& seq, int s, int j, int split, int count,
                                    const float (&o)[kTiles][4], const float (&m)[2],
                                    const float* totals, const BrokenValues& broken) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int group = static_cast<int>(a.heads / a.kv_heads), Kv = static_cast<int>(a.value_width);
  const bool whole = seq.keys <= kSplit;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = g + 8 * r;
    if (row >= count) continue;
    const float sum = totals[row], inverse = 1.0f / sum;
    const std::int64_t place = (seq.begin + row / group) * a.heads + j * group + row % group;
    const std::int64_t state = states.at(a, s, j, split, row);
    const int position = seq.first_position + row / group;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int column = warp * kTiles * 8 + i * 8 + t * 2;
      if (column >= Kv) continue;
      const float x = broken.value(o[i][2 * r] + (o[i][2 * r] - o[i][2 * r]), position, column);
      const float y =
          broken.value(o[i][2 * r + 1] + (o[i][2 * r + 1] - o[i][2 * r + 1]), position, column + 1);
      if (whole)
        *reinterpret_cast<unsigned*>(a.out + place * Kv + column) =
            pack_bf16(x * inverse, y * inverse);
      else
        *reinterpret_cast<float2*>(states.o + state * Kv + column) = {x, y};
    }
    if (warp != 0 || t != 0) continue;
    if (!whole) {
      states.m[state] = m[r];
      states.l[state] = sum;
    } else if (a.lse2 != nullptr) {
      a.lse2[place] = log_sum2(c, m[r], sum);
    }
  }
}

template <int kWidth, int kSlots>
__global__ __launch_bounds__(kThreads) void attention_decode_kernel(AttentionArgs a, float c,
                                                                    SplitStates states) {
  extern __shared__ __align__(16) unsigned char shared[];
  const DecodeShared layout(kWidth, kSlots);
  int* rows = reinterpret_cast<int*>(shared + layout.rows);
  const BrokenValues broken{shared_address(shared + layout.broken)};
  float* pairs = reinterpret_cast<float*>(shared + layout.pairs);
  float* warp_max = reinterpret_cast<float*>(shared + layout.highest);
  float* totals = reinterpret_cast<float*>(shared + layout.total);
  const int split = blockIdx.x, j = blockIdx.y, s = blockIdx.z;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const Sequence seq(a, s);
  const int group = static_cast<int>(a.heads / a.kv_heads);
  const int K = static_cast<int>(a.width);
  const std::int64_t total = std::int64_t{seq.queries} * group;
  const int begin = split * kSplit;
  if (total == 0 || total > kDecodeRows || begin >= seq.keys) return;
  const int count = static_cast<int>(total);
  const int end = seq.keys < begin + kSplit ? seq.keys : begin + kSplit;
  const int blocks = (end - begin + kBlock - 1) / kBlock;
  const auto place_of = [&](int row) {
    return (seq.begin + row / group) * a.heads + j * group + row % group;
  };

  broken.clear(kWidth, kThreads);
  for (int i = threadIdx.x; i < blocks * kBlock; i += kThreads)
    rows[i] = key_row(a, seq, s, begin + i, end);
  __syncthreads();
  const auto ring =
      key_ring<kWidth, kSlots>(a, j, rows, shared_address(shared + layout.ring), blocks);
  const SharedTile q{shared_address(shared + layout.q), kWidth + 8};
  for (int i = threadIdx.x; i < kDecodeRows * (kWidth / 8); i += kThreads) {
    const int row = i / (kWidth / 8), column = i % (kWidth / 8) * 8;
    if (column < K)
      copy_async(q.at(row, column), a.q + place_of(row < count ? row : 0) * K + column,
                 row < count);
  }
  ring.start();

  int position[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = g + 8 * r;
    position[r] = seq.first_position + (row < count ? row : count - 1) / group;
  }
  constexpr int kColumns = kWidth / kWarps;  // of values, a warp
  constexpr int kKeys = kBlock / kWarps;
  const SharedTile p_tile{shared_address(shared + layout.p), kBlock + 8};
  float m[2] = {kNone, kNone}, mc[2] = {kNone, kNone}, l = 0;
  float o[kColumns / 8][4] = {};
  for (int b = 0; b < blocks; ++b) {
    const int first = begin + b * kBlock + warp * kKeys;
    const SharedTile k = ring.acquire(2 * b);
    float p[kKeys / 8][4] = {};
    for (int d = 0; d < K; d += 16) {
      unsigned x[4], y[4];
      q.load_a(x, 0, d, lane);
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) {
        k.load_b(y, warp * kKeys + i * 16, d, lane);
        mma_bf16(p[2 * i], x, y[0], y[1]);
        mma_bf16(p[2 * i + 1], x, y[2], y[3]);
      }
    }
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
    __syncthreads();
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
        pairs[(g + 8 * r) * DecodeShared::kPairStride + tile * 4 + t] = x + y;
        *reinterpret_cast<unsigned*>(shared + layout.p +
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
    const SharedTile v = ring.acquire(2 * b + 1);                    // p and pairs are there, too
    const int late = seq.first_position + 1 - (begin + b * kBlock);  // keys not all rows see
    if (seq.queries > 1 && late < kBlock) {
      constexpr int kLanes = kWidth / 8;
      const int d = threadIdx.x % kLanes * 8, from = late > 0 ? late : 0;
      for (int i = from + static_cast<int>(threadIdx.x) / kLanes; d < a.value_width && i < kBlock;
           i += kThreads / kLanes)
        broken.check(v.at(i, d), begin + b * kBlock + i, d);
      __syncthreads();
    }
    if (warp < 2) {  // the sums of row g + 8 * warp
      l = l * (warp == 0 ? corr[0] : corr[1]);
      const float* from = pairs + (g + 8 * warp) * DecodeShared::kPairStride + t;
#pragma unroll
      for (int i = 0; i < kBlock / 8; ++i) l = l + from[i * 4];
    }
#pragma unroll
    for (int i = 0; i < kBlock / 16; ++i) {
      unsigned x[4], y[4];
      p_tile.load_a(x, 0, i * 16, lane);
#pragma unroll
      for (int d = 0; d < kColumns / 16; ++d) {
        v.load_b_transposed(y, i * 16, warp * kColumns + d * 16, lane);
        mma_bf16(o[2 * d], x, y[0], y[1]);
        mma_bf16(o[2 * d + 1], x, y[2], y[3]);
      }
    }
  }

  if (warp < 2) {
    const float sum = quad_total(l);
    if (t == 0) totals[g + 8 * warp] = sum;
  }
  __syncthreads();
  finish_split<kColumns / 8>(a, c, states, seq, s, j, split, count, o, m, totals, broken);
}

// A row's splits in ascending order.
template <int kMergeThreads>
__global__ __launch_bounds__(kMergeThreads) void attention_merge_kernel(AttentionArgs a, float c,
                                                                        SplitStates states) {
  const int row = blockIdx.x, j = blockIdx.y, s = blockIdx.z;
  const Sequence seq(a, s);
  const int group = static_cast<int>(a.heads / a.kv_heads);
  const int Kv = static_cast<int>(a.value_width);
  const std::int64_t total = std::int64_t{seq.queries} * group;
  if (seq.queries > states.most_queries || total > kDecodeRows || row >= total ||
      seq.keys <= kSplit)
    return;
  const int splits = (seq.first_position + row / group) / kSplit + 1;  // that the row sees
  const std::int64_t place = (seq.begin + row / group) * a.heads + j * group + row % group;
  for (int d = threadIdx.x; d < Kv; d += kMergeThreads) {
    std::int64_t state = states.at(a, s, j, 0, row);
    float m = states.m[state], l = states.l[state], o = states.o[state * Kv + d];
    for (int split = 1; split < splits; ++split) {
      state = states.at(a, s, j, split, row);
      float x, y;
      merge(c, states.m[state], states.l[state], &m, &l, &x, &y);
      o = numerics::fma(o, x, states.o[state * Kv + d] * y);
    }
    a.out[place * Kv + d] = numerics::to_bf16(o * (1.0f / l));
    if (d == 0 && a.lse2 != nullptr) a.lse2[place] = log_sum2(c, m, l);
  }
}

}  // namespace lockstep::ops::cuda

// Attention forward on mma.sync, any widths, pages and groups: a CTA has 64 rows (a position and a
// query head of the group each) of one KV head, a warp 16 of them with all keys of a block.
#pragma once

#include "ops/cuda/attention_parts.cuh"

namespace lockstep::ops::cuda {

inline constexpr int kTileRows = 64;

struct TileShared {
  int rows, broken, q, merged, ring, bytes;  // offsets

  __host__ __device__ TileShared(int width, int slots, bool several_splits) {
    rows = 0;
    broken = rows + kSplit * 4;
    q = broken + width * 4;
    merged = q + kTileRows * (width + 8) * 2;
    ring = merged + (several_splits ? kTileRows * width * 4 : 0);
    bytes = ring + slots * kBlock * (width + 8) * 2;
  }
};

// Two rows of a thread: g and g + 8 of its warp's 16.
struct RowPair {
  float m[2], mc[2], l[2];
};

// The softmax of one block: scores become p, the state moves on; corr is what O is multiplied by.
// position[r] - first is the last column that row r sees.
template <int kTiles>
__device__ inline void softmax_block(float (&s)[kTiles][4], const int (&last)[2], bool masked,
                                     float c, RowPair* w, float (&corr)[2]) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float m = w->m[r];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (masked) {
        if (i * 8 + column > last[r]) s[i][2 * r] = kNone;
        if (i * 8 + column + 1 > last[r]) s[i][2 * r + 1] = kNone;
      }
      m = fmaxf(m, fmaxf(s[i][2 * r], s[i][2 * r + 1]));
    }
    m = quad_max(m);
    const float mc = m * c;
    corr[r] = softmax_exp2(w->mc[r] - mc);
    w->m[r] = m;
    w->mc[r] = mc;
    float l = w->l[r] * corr[r];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      s[i][2 * r] = softmax_exp2(numerics::fma(s[i][2 * r], c, -mc));
      s[i][2 * r + 1] = softmax_exp2(numerics::fma(s[i][2 * r + 1], c, -mc));
      l = l + (s[i][2 * r] + s[i][2 * r + 1]);
    }
    w->l[r] = l;
  }
}

template <int kWidth, int kSlots>
__global__ __launch_bounds__(kThreads) void attention_tile_kernel(AttentionArgs a, float c,
                                                                  int decode_rows,
                                                                  bool several_splits) {
  extern __shared__ __align__(16) unsigned char shared[];
  const TileShared layout(kWidth, kSlots, several_splits);
  int* rows = reinterpret_cast<int*>(shared + layout.rows);
  const BrokenValues broken{shared_address(shared + layout.broken)};
  float* merged = reinterpret_cast<float*>(shared + layout.merged) + threadIdx.x;
  const int s = blockIdx.z, j = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Sequence seq(a, s);
  const int group = static_cast<int>(a.heads / a.kv_heads);
  const int K = static_cast<int>(a.width), Kv = static_cast<int>(a.value_width);
  const std::int64_t total = std::int64_t{seq.queries} * group;
  const int tiles = static_cast<int>((total + kTileRows - 1) / kTileRows);
  if (total <= decode_rows || static_cast<int>(blockIdx.x) >= tiles) return;
  const std::int64_t first = std::int64_t{tiles - 1 - static_cast<int>(blockIdx.x)} * kTileRows;
  const std::int64_t last = (first + kTileRows < total ? first + kTileRows : total) - 1;
  const int end = seq.first_position + static_cast<int>(last / group) + 1;
  const int seen_by_all = seq.first_position + static_cast<int>(first / group) + 1;  // keys
  broken.clear(kWidth, kThreads);
  // Row `row` of the tile is query head group * j + % group of this position; -1: no row.
  const auto place_of = [&](int row) -> std::int64_t {
    const std::int64_t flat = first + row;
    return flat > last ? -1 : (seq.begin + flat / group) * a.heads + j * group + flat % group;
  };

  const SharedTile q{shared_address(shared + layout.q), kWidth + 8};
  for (int i = threadIdx.x; i < kTileRows * (kWidth / 8); i += kThreads) {
    const int row = i / (kWidth / 8), column = i % (kWidth / 8) * 8;
    const std::int64_t place = place_of(row);
    if (column < K)
      copy_async(q.at(row, column), a.q + (place < 0 ? 0 : place) * K + column, place >= 0);
  }
  int position[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const std::int64_t flat = first + warp * 16 + lane / 4 + 8 * r;
    position[r] = seq.first_position + static_cast<int>((flat < last ? flat : last) / group);
  }
  const int lowest = __shfl_sync(0xFFFFFFFFu, position[0], 0);
  const int highest = __shfl_sync(0xFFFFFFFFu, position[1], 31);

  float merged_m[2], merged_l[2];
  float o[kWidth / 8][4];
  for (int split = 0; split < end; split += kSplit) {
    const int keys = end - split < kSplit ? end - split : kSplit;
    const int blocks = (keys + kBlock - 1) / kBlock;
    __syncthreads();
    for (int i = threadIdx.x; i < blocks * kBlock; i += kThreads)
      rows[i] = key_row(a, seq, s, split + i, end);
    __syncthreads();
    const auto ring =
        key_ring<kWidth, kSlots>(a, j, rows, shared_address(shared + layout.ring), blocks);
    ring.start();
    RowPair w{{kNone, kNone}, {kNone, kNone}, {0, 0}};
#pragma unroll
    for (auto& tile : o)
      for (float& x : tile) x = 0.0f;
    for (int b = 0; b < blocks; ++b) {
      const int block = split + b * kBlock;
      const SharedTile k = ring.acquire(2 * b);
      float p[kBlock / 8][4] = {}, corr[2];
      for (int d = 0; d < K; d += 16) {
        unsigned x[4], y[4];
        q.load_a(x, warp * 16, d, lane);
#pragma unroll
        for (int i = 0; i < kBlock / 16; ++i) {
          k.load_b(y, i * 16, d, lane);
          mma_bf16(p[2 * i], x, y[0], y[1]);
          mma_bf16(p[2 * i + 1], x, y[2], y[3]);
        }
      }
      const int seen[2] = {position[0] - block, position[1] - block};
      softmax_block(p, seen, block + kBlock - 1 > lowest, c, &w, corr);
#pragma unroll
      for (auto& tile : o) {
        tile[0] = tile[0] * corr[0];
        tile[1] = tile[1] * corr[0];
        tile[2] = tile[2] * corr[1];
        tile[3] = tile[3] * corr[1];
      }
      const SharedTile v = ring.acquire(2 * b + 1);
      if (block + kBlock > seen_by_all) {
        constexpr int kLanes = kWidth / 8;
        const int row = static_cast<int>(threadIdx.x) / kLanes, d = threadIdx.x % kLanes * 8;
        for (int i = row; d < Kv && i < kBlock; i += kThreads / kLanes)
          if (block + i >= seen_by_all) broken.check(v.at(i, d), block + i, d);
        __syncthreads();
      }
      if (block > highest) continue;
#pragma unroll
      for (int i = 0; i < kBlock / 16; ++i) {
        const unsigned x[4] = {pack_bf16(p[2 * i][0], p[2 * i][1]),
                               pack_bf16(p[2 * i][2], p[2 * i][3]),
                               pack_bf16(p[2 * i + 1][0], p[2 * i + 1][1]),
                               pack_bf16(p[2 * i + 1][2], p[2 * i + 1][3])};
#pragma unroll
        for (int d = 0; d < kWidth / 16; ++d) {
          unsigned y[4];
          v.load_b_transposed(y, i * 16, d * 16, lane);
          mma_bf16(o[2 * d], x, y[0], y[1]);
          mma_bf16(o[2 * d + 1], x, y[2], y[3]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float l = quad_total(w.l[r]);
      float x = 1, y = 1;
      if (split == 0) {
        merged_m[r] = w.m[r];
        merged_l[r] = l;
      } else if (position[r] >= split) {
        merge(c, w.m[r], l, &merged_m[r], &merged_l[r], &x, &y);
      }
#pragma unroll
      for (int i = 0; i < kWidth / 8; ++i)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          o[i][e] = o[i][e] + (o[i][e] - o[i][e]);
          if (end <= kSplit) continue;
          float* state = merged + (i * 4 + e) * kThreads;
          if (split > 0)
            o[i][e] = position[r] >= split ? numerics::fma(*state, x, o[i][e] * y) : *state;
          *state = o[i][e];
        }
    }
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const std::int64_t place = place_of(warp * 16 + lane / 4 + 8 * r);
    if (place < 0) continue;
    const float inverse = 1.0f / merged_l[r];
#pragma unroll
    for (int i = 0; i < kWidth / 8; ++i) {
      const int column = i * 8 + lane % 4 * 2;
      if (column < Kv)
        *reinterpret_cast<unsigned*>(a.out + place * Kv + column) =
            pack_bf16(broken.value(o[i][2 * r] * inverse, position[r], column),
                      broken.value(o[i][2 * r + 1] * inverse, position[r], column + 1));
    }
    if (a.lse2 != nullptr && lane % 4 == 0) a.lse2[place] = log_sum2(c, merged_m[r], merged_l[r]);
  }
}

}  // namespace lockstep::ops::cuda

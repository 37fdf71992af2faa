// Attention backward on mma.sync, any widths and groups (docs/numerics.md, section 8): dQ by query
// tiles over key blocks, dK and dV by key tiles over queries. A warp has 16 rows of its tile.
#pragma once

#include "ops/cuda/attention_parts.cuh"

namespace lockstep::ops::cuda {

inline constexpr int kGradientRows = 64;  // queries or keys a CTA

// delta of every (token, head): a warp each.
template <int kDeltaThreads>
__global__ __launch_bounds__(kDeltaThreads) void attention_delta_kernel(const Bf16* d_out,
                                                                        const Bf16* out,
                                                                        std::int64_t count, int Kv,
                                                                        float* delta_TH) {
  const std::int64_t row =
      std::int64_t{blockIdx.x} * (kDeltaThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (row >= count) return;
  const float delta = row_delta(d_out + row * Kv, out + row * Kv, Kv);
  if (threadIdx.x % 32 == 0) delta_TH[row] = delta;
}

// Rows [first, first + kRows) of a head's matrix to shared memory, zeros from `end` on.
template <int kWidth, int kRows>
__device__ inline void load_rows(const SharedTile& to, const Bf16* from, std::int64_t stride,
                                 int width, int first, int end) {
  constexpr int kLanes = kWidth / 8;
  const int column = static_cast<int>(threadIdx.x) % kLanes * 8;
  if (column >= width) return;
#pragma unroll 8
  for (int r = static_cast<int>(threadIdx.x) / kLanes; r < kRows; r += kThreads / kLanes) {
    const bool present = first + r < end;
    copy_async(to.at(r, column), from + (present ? first + r : 0) * stride + column, present);
  }
}

template <int kWidth>
struct QueryGradientShared {
  static constexpr int kStride = kWidth + 8;
  static constexpr int kQueryBytes = kGradientRows * kStride * 2;
  static constexpr int kKeyBytes = kBlock * kStride * 2;
  static constexpr int kStages = kWidth > 128 ? 1 : 2;
  static constexpr int kBytes = 2 * kQueryBytes + kStages * 2 * kKeyBytes;
};

template <int kWidth>
__global__ __launch_bounds__(kThreads) void attention_d_q_kernel(AttentionArgs a, float c,
                                                                 const float* delta_TH) {
  using Shared = QueryGradientShared<kWidth>;
  constexpr int kStages = Shared::kStages;
  extern __shared__ __align__(16) unsigned char shared[];
  const int s = blockIdx.z, h = blockIdx.y, j = h / static_cast<int>(a.heads / a.kv_heads);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4;
  const Sequence seq(a, s);
  const int tiles = (seq.queries + kGradientRows - 1) / kGradientRows;
  if (static_cast<int>(blockIdx.x) >= tiles) return;
  const int first = (tiles - 1 - static_cast<int>(blockIdx.x)) * kGradientRows;
  const int end = first + kGradientRows < seq.queries ? first + kGradientRows : seq.queries;
  const int K = static_cast<int>(a.width), Kv = static_cast<int>(a.value_width);
  const SharedTile q{shared_address(shared), Shared::kStride};
  const SharedTile d_out{q.address + Shared::kQueryBytes, Shared::kStride};
  const std::int64_t head = seq.begin * a.heads + h, kv_head = seq.begin * a.kv_heads + j;
  load_rows<kWidth, kGradientRows>(q, a.q + head * K, a.heads * K, K, first, end);
  load_rows<kWidth, kGradientRows>(d_out, a.d_out + head * Kv, a.heads * Kv, Kv, first, end);
  const auto stage = [&](int b) -> unsigned {
    return d_out.address + Shared::kQueryBytes +
           static_cast<unsigned>(b % kStages * 2 * Shared::kKeyBytes);
  };
  const auto load = [&](int b) {
    load_rows<kWidth, kBlock>({stage(b), Shared::kStride}, a.k + kv_head * K, a.kv_heads * K, K,
                              b * kBlock, end);
    load_rows<kWidth, kBlock>({stage(b) + Shared::kKeyBytes, Shared::kStride}, a.v + kv_head * Kv,
                              a.kv_heads * Kv, Kv, b * kBlock, end);
    copy_commit();
  };

  int position[2];
  float lse2[2], delta[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    position[r] = first + warp * 16 + lane / 4 + 8 * r;
    const std::int64_t place = head + (position[r] < end ? position[r] : end - 1) * a.heads;
    lse2[r] = a.lse2[place];
    delta[r] = delta_TH[place];
  }
  float d_q[kWidth / 8][4] = {};
  const int blocks = (end + kBlock - 1) / kBlock;
  load(0);
  for (int b = 0; b < blocks; ++b) {
    if (kStages > 1 && b + 1 < blocks) {
      load(b + 1);
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    __syncthreads();
    const SharedTile k{stage(b), Shared::kStride};
    const SharedTile v{stage(b) + Shared::kKeyBytes, Shared::kStride};
    unsigned ds[kBlock / 16][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float p[8][4] = {}, dp[8][4] = {};
      for (int d = 0; d < K; d += 16) {
        unsigned x[4], y[4];
        q.load_a(x, warp * 16, d, lane);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          k.load_b(y, half * 64 + i * 16, d, lane);
          mma_bf16(p[2 * i], x, y[0], y[1]);
          mma_bf16(p[2 * i + 1], x, y[2], y[3]);
        }
      }
      for (int d = 0; d < Kv; d += 16) {
        unsigned x[4], y[4];
        d_out.load_a(x, warp * 16, d, lane);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v.load_b(y, half * 64 + i * 16, d, lane);
          mma_bf16(dp[2 * i], x, y[0], y[1]);
          mma_bf16(dp[2 * i + 1], x, y[2], y[3]);
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = b * kBlock + half * 64 + i * 8 + t * 2 + e % 2, r = e / 2;
          const float x = softmax_exp2(numerics::fma(p[i][e], c, -lse2[r]));
          p[i][e] = key <= position[r] ? x * (dp[i][e] - delta[r]) : 0.0f;
        }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ds[half * 4 + i][0] = pack_bf16(p[2 * i][0], p[2 * i][1]);
        ds[half * 4 + i][1] = pack_bf16(p[2 * i][2], p[2 * i][3]);
        ds[half * 4 + i][2] = pack_bf16(p[2 * i + 1][0], p[2 * i + 1][1]);
        ds[half * 4 + i][3] = pack_bf16(p[2 * i + 1][2], p[2 * i + 1][3]);
      }
    }
#pragma unroll
    for (int d = 0; d < kWidth / 32; ++d) {
      float part[4][4] = {};
#pragma unroll
      for (int i = 0; i < kBlock / 16; ++i)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          unsigned y[4];
          k.load_b_transposed(y, i * 16, d * 32 + n * 16, lane);
          mma_bf16(part[2 * n], ds[i], y[0], y[1]);
          mma_bf16(part[2 * n + 1], ds[i], y[2], y[3]);
        }
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) d_q[d * 4 + n][e] = d_q[d * 4 + n][e] + part[n][e];
    }
    __syncthreads();
    if (kStages == 1 && b + 1 < blocks) load(b + 1);
  }
  const auto scale = static_cast<float>(a.scale);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (position[r] >= end) continue;
    Bf16* to = a.d_q + (head + position[r] * a.heads) * K;
#pragma unroll
    for (int i = 0; i < kWidth / 8; ++i) {
      const int column = i * 8 + t * 2;
      if (column < K)
        *reinterpret_cast<unsigned*>(to + column) =
            pack_bf16(d_q[i][2 * r] * scale, d_q[i][2 * r + 1] * scale);
    }
  }
}

template <int kWidth, bool kBoth>
struct KeyGradientShared {
  static constexpr int kStride = kWidth + 8;
  static constexpr int kTileBytes = kGradientRows * kStride * 2;
  static constexpr int kStages = kWidth > 128 ? 1 : 2;
  static constexpr int kRowBytes = kGradientRows * 2 * 4;  // lse2 and delta of a stage's queries
  static constexpr int kStageBytes = 2 * kTileBytes + kRowBytes;
  static constexpr int kSum = 2 * kTileBytes + kStages * kStageBytes;  // offset
  static constexpr int bytes(bool grouped) {
    return kSum + (grouped ? kGradientRows * kWidth * 4 * (kBoth ? 2 : 1) : 0);
  }
};

// kKeys: dK; kValues: dV; both, or one where the registers hold no more.
template <int kWidth, bool kKeys, bool kValues>
__global__ __launch_bounds__(kThreads) void attention_d_kv_kernel(AttentionArgs a, float c,
                                                                  const float* delta_TH) {
  using Shared = KeyGradientShared<kWidth, kKeys && kValues>;
  constexpr int kStages = Shared::kStages;
  constexpr int kTiles = kWidth / 8;
  extern __shared__ __align__(16) unsigned char shared[];
  const int s = blockIdx.z, j = blockIdx.y, first = static_cast<int>(blockIdx.x) * kGradientRows;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4;
  const Sequence seq(a, s);
  const int n = seq.queries;
  if (first >= n) return;
  const int group = static_cast<int>(a.heads / a.kv_heads);
  const int K = static_cast<int>(a.width), Kv = static_cast<int>(a.value_width);
  const SharedTile k{shared_address(shared), Shared::kStride};
  const SharedTile v{k.address + Shared::kTileBytes, Shared::kStride};
  float* sum = reinterpret_cast<float*>(shared + Shared::kSum) + threadIdx.x;
  const std::int64_t kv_head = seq.begin * a.kv_heads + j;
  load_rows<kWidth, kGradientRows>(k, a.k + kv_head * K, a.kv_heads * K, K, first, n);
  load_rows<kWidth, kGradientRows>(v, a.v + kv_head * Kv, a.kv_heads * Kv, Kv, first, n);

  // Query tiles of the group's heads one after the other.
  const int tiles = (n - first + kGradientRows - 1) / kGradientRows;
  const auto stage_offset = [&](int i) {
    return 2 * Shared::kTileBytes + i % kStages * Shared::kStageBytes;
  };
  const auto load = [&](int i) {
    const std::int64_t head = seq.begin * a.heads + j * group + i / tiles;
    const int query = first + i % tiles * kGradientRows;
    const unsigned to = k.address + static_cast<unsigned>(stage_offset(i));
    load_rows<kWidth, kGradientRows>({to, Shared::kStride}, a.q + head * K, a.heads * K, K, query,
                                     n);
    load_rows<kWidth, kGradientRows>({to + Shared::kTileBytes, Shared::kStride},
                                     a.d_out + head * Kv, a.heads * Kv, Kv, query, n);
    float* rows = reinterpret_cast<float*>(shared + stage_offset(i) + 2 * Shared::kTileBytes);
    if (threadIdx.x < kGradientRows) {
      const int row = query + static_cast<int>(threadIdx.x);
      const std::int64_t place = head + (row < n ? row : n - 1) * a.heads;
      rows[threadIdx.x] = a.lse2[place];
      rows[kGradientRows + threadIdx.x] = delta_TH[place];
    }
    copy_commit();
  };

  float d_k[kKeys ? kTiles : 1][4] = {}, d_v[kValues ? kTiles : 1][4] = {};
  const int key[2] = {first + warp * 16 + lane / 4, first + warp * 16 + lane / 4 + 8};
  load(0);
  for (int i = 0; i < tiles * group; ++i) {
    if (kStages > 1 && i + 1 < tiles * group) {
      load(i + 1);
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    __syncthreads();
    const int query = first + i % tiles * kGradientRows;
    const SharedTile q{k.address + static_cast<unsigned>(stage_offset(i)), Shared::kStride};
    const SharedTile d_out{q.address + Shared::kTileBytes, Shared::kStride};
    const float* lse2 =
        reinterpret_cast<const float*>(shared + stage_offset(i) + 2 * Shared::kTileBytes);
    const float* delta = lse2 + kGradientRows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float p[4][4] = {}, dp[4][4] = {};
      for (int d = 0; d < K; d += 16) {
        unsigned x[4], y[4];
        k.load_a(x, warp * 16, d, lane);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          q.load_b(y, half * 32 + m * 16, d, lane);
          mma_bf16(p[2 * m], x, y[0], y[1]);
          mma_bf16(p[2 * m + 1], x, y[2], y[3]);
        }
      }
      if (kKeys) {
        for (int d = 0; d < Kv; d += 16) {
          unsigned x[4], y[4];
          v.load_a(x, warp * 16, d, lane);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            d_out.load_b(y, half * 32 + m * 16, d, lane);
            mma_bf16(dp[2 * m], x, y[0], y[1]);
            mma_bf16(dp[2 * m + 1], x, y[2], y[3]);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = half * 32 + m * 8 + t * 2 + e % 2;
          const bool seen = query + row < n && key[e / 2] <= query + row;
          const float x = softmax_exp2(numerics::fma(p[m][e], c, -lse2[row]));
          p[m][e] = seen ? x : 0.0f;
          if (kKeys) dp[m][e] = seen ? x * (dp[m][e] - delta[row]) : 0.0f;
        }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const unsigned x[4] = {pack_bf16(p[2 * m][0], p[2 * m][1]),
                               pack_bf16(p[2 * m][2], p[2 * m][3]),
                               pack_bf16(p[2 * m + 1][0], p[2 * m + 1][1]),
                               pack_bf16(p[2 * m + 1][2], p[2 * m + 1][3])};
        const unsigned z[4] = {pack_bf16(dp[2 * m][0], dp[2 * m][1]),
                               pack_bf16(dp[2 * m][2], dp[2 * m][3]),
                               pack_bf16(dp[2 * m + 1][0], dp[2 * m + 1][1]),
                               pack_bf16(dp[2 * m + 1][2], dp[2 * m + 1][3])};
#pragma unroll
        for (int d = 0; d < kTiles / 2; ++d) {
          unsigned y[4];
          if (kValues) {
            d_out.load_b_transposed(y, half * 32 + m * 16, d * 16, lane);
            mma_bf16(d_v[2 * d], x, y[0], y[1]);
            mma_bf16(d_v[2 * d + 1], x, y[2], y[3]);
          }
          if (kKeys) {
            q.load_b_transposed(y, half * 32 + m * 16, d * 16, lane);
            mma_bf16(d_k[2 * d], z, y[0], y[1]);
            mma_bf16(d_k[2 * d + 1], z, y[2], y[3]);
          }
        }
      }
    }
    if (group > 1 && (i + 1) % tiles == 0) {  // the end of a head
      const bool is_first = i < tiles, is_last = i + 1 == tiles * group;
      float* at = sum;
      const auto add = [&](float& x) {
        if (!is_first) x = *at + x;
        *at = x;
        if (!is_last) x = 0.0f;
        at += kThreads;
      };
      if (kKeys)
#pragma unroll
        for (auto& tile : d_k)
          for (float& x : tile) add(x);
      if (kValues)
#pragma unroll
        for (auto& tile : d_v)
          for (float& x : tile) add(x);
    }
    __syncthreads();
    if (kStages == 1 && i + 1 < tiles * group) load(i + 1);
  }
  const auto scale = static_cast<float>(a.scale);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (key[r] >= n) continue;
    const std::int64_t place = kv_head + key[r] * a.kv_heads;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int column = i * 8 + t * 2;
      if (kKeys && column < K)
        *reinterpret_cast<unsigned*>(a.d_k + place * K + column) =
            pack_bf16(d_k[i][2 * r] * scale, d_k[i][2 * r + 1] * scale);
      if (kValues && column < Kv)
        *reinterpret_cast<unsigned*>(a.d_v + place * Kv + column) =
            pack_bf16(d_v[i][2 * r], d_v[i][2 * r + 1]);
    }
  }
}

}  // namespace lockstep::ops::cuda

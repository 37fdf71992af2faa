// Quantizing whole rows of any alignment, one warp a row: what needs the row before its first code
// (the norm, or one scale a row) keeps it in shared memory and reads it once from device memory.
// Lane l has the eights of columns l, l + 32, l + 64 ..: the order of lane_sum (docs/numerics.md,
// section 3).
#pragma once

#include "ops/cuda/quantize_launch.cuh"

namespace lockstep::ops::cuda {

inline constexpr int kRowWarps = 4;
inline constexpr int kEncodeBatch = 4;  // eights of a row that a lane encodes side by side
inline constexpr int kRowBatch = 4;     // 16-byte loads that a lane has in flight from each input

struct RowPlan {
  std::int64_t M = 0, K = 0;
  const Bf16* x = nullptr;
  // With a norm; delta and h may be null.
  const Bf16 *delta = nullptr, *w = nullptr;
  Bf16 *x_out = nullptr, *h = nullptr;
  float* rstd = nullptr;
  float eps = 0;
  // Null codes: only x_out and rstd are written, and no shared memory is used.
  Fp8* codes = nullptr;
  float* scales = nullptr;
  bool blocks = true, pow2 = false;
  QuantStats* stats = nullptr;
};

inline std::int64_t row_memory_bytes(std::int64_t K) { return kRowWarps * ((K + 7) / 8) * 16; }

__device__ inline Bf16x8 add8(const Bf16x8& a, const Bf16x8& b) {
  Bf16x8 y;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    y.w[i] =
        pack_bf16(value(a, 2 * i) + value(b, 2 * i), value(a, 2 * i + 1) + value(b, 2 * i + 1));
  return y;
}
__device__ inline Bf16x8 normalised8(const Bf16x8& x, float rstd, const Bf16x8& w) {
  Bf16x8 y;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    y.w[i] = pack_bf16((value(x, 2 * i) * rstd) * value(w, 2 * i),
                       (value(x, 2 * i + 1) * rstd) * value(w, 2 * i + 1));
  return y;
}

__device__ inline void encode_row8(const RowPlan& plan, const Bf16x8& h, std::int64_t row,
                                   std::int64_t k, float inv, ThreadStats& stats) {
  const std::int64_t n = plan.K - k;
  const uint2 codes = encode8(h, inv);
  store_codes<false>(plan.codes + row * plan.K + k, codes, n);
  if (plan.stats == nullptr || n <= 0) return;
  stats.values += n < 8 ? static_cast<unsigned>(n) : 8u;
  stats.flushed += flushed(h, codes);
}

template <bool kNorm>
__global__ void __launch_bounds__(kRowWarps * 32) quantize_whole_rows(const RowPlan plan) {
  extern __shared__ __align__(128) uint4 shared[];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t pieces = (plan.K + 7) / 8, K = plan.K;
  const bool keeps = plan.codes != nullptr;
  uint4* row_memory = shared + warp * pieces;
  ThreadStats stats;
  const std::int64_t stride = std::int64_t{gridDim.x} * kRowWarps;
  for (std::int64_t row = std::int64_t{blockIdx.x} * kRowWarps + warp; row < plan.M;
       row += stride) {
    float acc = 0.0f;
    std::uint32_t amax = 0;
    for (std::int64_t p0 = lane; p0 < pieces; p0 += 32 * kRowBatch) {
      Bf16x8 x[kRowBatch], d[kRowBatch];
#pragma unroll
      for (int i = 0; i < kRowBatch; ++i) {
        const std::int64_t k = (p0 + 32 * i) * 8;
        x[i] = load8<false>(plan.x + row * K + k, K - k);
        if constexpr (kNorm)
          if (plan.delta != nullptr) d[i] = load8<false>(plan.delta + row * K + k, K - k);
      }
#pragma unroll
      for (int i = 0; i < kRowBatch; ++i) {
        const std::int64_t p = p0 + 32 * i, k = p * 8;
        if (p >= pieces) continue;
        if constexpr (kNorm) {
          if (plan.delta != nullptr) x[i] = add8(x[i], d[i]);
          if (plan.delta != nullptr || plan.x_out != plan.x)
            store8<false>(plan.x_out + row * K + k, x[i], K - k);
#pragma unroll
          for (int c = 0; c < 8; ++c) acc = numerics::fma(value(x[i], c), value(x[i], c), acc);
        } else {
          amax = max(amax, largest(x[i]));
        }
        if (keeps) row_memory[p] = shared8(x[i]);
      }
    }
    float rstd = 0.0f;
    if constexpr (kNorm) {
      const float mean = butterfly_sum(acc) / static_cast<float>(K);
      rstd = 1.0f / sqrtf(mean + plan.eps);
      if (lane == 0) plan.rstd[row] = rstd;
    }
    if (!keeps) continue;
    // From here on a lane reads only what it wrote.
    if constexpr (kNorm) {
      for (std::int64_t round = 0; round * 32 < pieces; round += kEncodeBatch) {
        const std::int64_t p0 = round * 32 + lane;
        Bf16x8 h[kEncodeBatch];
        std::uint32_t m[kEncodeBatch];
#pragma unroll
        for (int i = 0; i < kEncodeBatch; ++i) {
          const std::int64_t k = (p0 + 32 * i) * 8;
          h[i] = load8<false>(plan.w + k, K - k);
        }
#pragma unroll
        for (int i = 0; i < kEncodeBatch; ++i) {
          const std::int64_t p = p0 + 32 * i, k = p * 8;
          h[i] = p < pieces ? normalised8(shared8(&row_memory[p]), rstd, h[i]) : Bf16x8{};
          if (plan.h != nullptr) store8<false>(plan.h + row * K + k, h[i], K - k);
          m[i] = largest(h[i]);
        }
        if (!plan.blocks) {
#pragma unroll
          for (int i = 0; i < kEncodeBatch; ++i) {
            amax = max(amax, m[i]);
            if (p0 + 32 * i < pieces) row_memory[p0 + 32 * i] = shared8(h[i]);
          }
          continue;
        }
#pragma unroll
        for (int d = 8; d >= 1; d /= 2)
#pragma unroll
          for (int i = 0; i < kEncodeBatch; ++i) m[i] = partner_max(m[i], m[i], d);
#pragma unroll
        for (int i = 0; i < kEncodeBatch; ++i) {
          const std::int64_t k = (p0 + 32 * i) * 8;
          const float s = scale_of(m[i], plan.pow2);
          if (lane % 16 == 0 && k < K) {
            plan.scales[k / kQuantBlock * plan.M + row] = s;
            if (plan.stats != nullptr) stats.count_block(m[i]);
          }
          if (k < K) encode_row8(plan, h[i], row, k, 1.0f / s, stats);
        }
      }
      if (plan.blocks) continue;
    }
    amax = __reduce_max_sync(kAllLanes, amax);
    const float s = scale_of(amax, plan.pow2), inv = 1.0f / s;
    if (lane == 0) {
      plan.scales[row] = s;
      if (plan.stats != nullptr) stats.count_block(amax);
    }
    for (std::int64_t p = lane; p < pieces; p += 32)
      encode_row8(plan, shared8(&row_memory[p]), row, p * 8, inv, stats);
  }
  if (plan.stats != nullptr && keeps) flush_stats(stats, plan.stats);
}

// False where a row does not fit shared memory.
template <bool kNorm>
bool launch_rows(const Context& ctx, const RowPlan& plan) {
  const std::int64_t bytes = plan.codes != nullptr ? row_memory_bytes(plan.K) : 0;
  if (bytes > 160 * 1024) return false;
  if (plan.M == 0) return true;
  const auto kernel = quantize_whole_rows<kNorm>;
  allow_shared_memory(kernel, static_cast<int>(bytes));
  const std::int64_t wanted = (plan.M + kRowWarps - 1) / kRowWarps;
  const std::int64_t most = std::int64_t{kMultiprocessors} * 12;
  kernel<<<static_cast<unsigned>(std::min(wanted, most)), kRowWarps * 32,
           static_cast<std::size_t>(bytes), stream_of(ctx)>>>(plan);
  LOCKSTEP_CUDA_LAUNCHED("quantize_whole_rows");
  return true;
}

}  // namespace lockstep::ops::cuda

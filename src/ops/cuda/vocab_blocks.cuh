// The pass over the logits: m, s and e of each block of 128 tokens, and the best token so far.
//
// A warp takes eight blocks at a time, four lanes a block. Lane t of the four holds tokens
// 16 j + 4 t .. + 3: pairs of the quad_sum's chains (0, 1), (2, 3), (0, 1), (2, 3). Lanes t and
// t + 2 hand each other one pair of two, so that each lane adds up one whole chain: 0, 2, 1, 3.
#pragma once

#include "base/philox.h"
#include "ops/cuda/vocab_row.cuh"

namespace lockstep::ops::cuda {

constexpr int kBlockThreads = 128;
constexpr int kGroup = 8;  // blocks a warp takes at a time
constexpr int kSteps = kBlock / 16;

// Two pairs of each lane onto the lane's chain.
__device__ inline void add_pairs(float first, float second, bool upper, float& chain) {
  const float other = __shfl_xor_sync(0xFFFFFFFFu, upper ? first : second, 2);
  chain = (chain + (upper ? other : first)) + (upper ? second : other);
}
__device__ inline float quad_total(float chain) {
  chain = chain + __shfl_xor_sync(0xFFFFFFFFu, chain, 2);
  return chain + __shfl_xor_sync(0xFFFFFFFFu, chain, 1);
}

// step(j, p) sees the probabilities of four tokens relative to the block's best.
template <typename Step>
__device__ inline void block_sums(const float (&z)[kSteps][4], float max, bool upper, float& s,
                                  float& e, Step step) {
  float p_chain = 0.0f, pd_chain = 0.0f;
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    float p[4], pd[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float d = fmaxf(z[j][k] - max, kFloor);
      p[k] = numerics::exp2_nonpositive(d * numerics::kLog2e);
      pd[k] = p[k] * d;
    }
    step(j, p);
    add_pairs(p[0] + p[1], p[2] + p[3], upper, p_chain);
    add_pairs(pd[0] + pd[1], pd[2] + pd[3], upper, pd_chain);
  }
  s = quad_total(p_chain);
  e = quad_total(pd_chain);
}

__device__ inline float warp_best_score(float score) {
#pragma unroll
  for (int d = 16; d >= 1; d /= 2) score = fmaxf(score, __shfl_xor_sync(0xFFFFFFFFu, score, d));
  return score;
}

struct Noise {
  std::uint64_t seed, stream, low;
  __device__ base::PhiloxWords words(std::int64_t v) const {
    return base::philox4x32(seed, stream, low | static_cast<std::uint64_t>(v / 4));
  }
};

// z + Gumbel noise.
__device__ inline float noisy_score(float z, std::uint32_t word) {
  const float u = (static_cast<float>(static_cast<std::int32_t>(word >> 9)) + 0.5f) * 0x1p-23f;
  return z - numerics::log(-numerics::log(u));
}

// Four neighbours, of which some are kept, and the bounds of what their random words can win with.
struct Fours {
  float4 limit[kGroup * kBlock / 4];
  std::int32_t first[kGroup * kBlock / 4];
};

// Draws among the tokens of eight blocks at a time. The score z - log(-log(u)) reaches `bound`, a
// score that was reached before, only where 1 - u <= exp(z - bound), because exp(-y) >= 1 - y; so
// most tokens are ruled out by one comparison of their random word with their probability, and the
// scores of the others are computed in a loop of its own.
struct Sampler {
  Noise noise;
  const float* row;
  std::int64_t V;
  Cut cut;
  float inv_t;
  Draw best;
  float bound;
  float lift;  // of the current block: exp(max - bound), and more than all rounding can do
  std::uint32_t candidates;

  __device__ void try_token(std::int64_t v) {
    if (v >= V) return;
    const float z = row[v] * inv_t;
    if (!kept(z, v, cut)) return;
    const base::PhiloxWords w = noise.words(v);
    const std::uint32_t low = (v & 1) != 0 ? w.word[1] : w.word[0],
                        high = (v & 1) != 0 ? w.word[3] : w.word[2];
    const std::uint32_t word = (v & 2) != 0 ? high : low;
    best = better(best, {noisy_score(z, word), static_cast<std::int32_t>(v)});
  }

  // Before the tokens of a block. Returns whether one of the warp's blocks can reach the bound.
  __device__ bool start(const float (&z)[kSteps][4], std::int64_t first_v, float block_max) {
    candidates = 0;
    if (bound == -kInfinity) {  // the first blocks: the likeliest token of each lane
      float top = -kInfinity;
      int at = -1;
#pragma unroll
      for (int i = 0; i < 4 * kSteps; ++i)
        if (z[i / 4][i % 4] > top) top = z[i / 4][i % 4], at = i;
      if (at >= 0) try_token(first_v + at / 4 * 16 + at % 4);
      bound = warp_best_score(best.score);
    }
    // Tokens that the cap rules out are so far below their block's best that they lose to it.
    const float slack = 0.01f + (fabsf(bound) + fabsf(block_max)) * 1e-5f;
    lift = fminf(__expf((block_max - bound) + slack), 1e30f);
    return __any_sync(0xFFFFFFFFu, block_max > -kInfinity && !(lift < 0x1p-25f)) != 0;
  }

  __device__ float limit(float p) const { return numerics::fma(p, lift, 1.0f + 0x1p-22f); }
  __device__ static bool can_win(std::uint32_t word, float limit) {
    return numerics::bits_float((word >> 9) ^ 0x3FFFFFFFu) <= limit;  // below 2 - u
  }
  __device__ void step(int j, const float (&p)[4], std::int64_t first_v) {
    const base::PhiloxWords w = noise.words(first_v + 16 * j);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (can_win(w.word[k], limit(p[k]))) candidates |= 1u << (4 * j + k);
  }

  // The same where few tokens are kept: the fours without one need no random words. First the
  // warp's others are listed, then lanes share them.
  __device__ void list(int j, const float (&z)[4], const float (&p)[4], std::int64_t first_v,
                       Fours& fours, int& count) const {
    const bool any = fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3])) > -kInfinity;
    const unsigned all = __ballot_sync(0xFFFFFFFFu, any);
    const int at = count + __popc(all & ((1u << threadIdx.x % 32) - 1));
    if (any) {
      fours.limit[at] = {limit(p[0]), limit(p[1]), limit(p[2]), limit(p[3])};
      fours.first[at] = static_cast<std::int32_t>(first_v) + 16 * j;
    }
    count += __popc(all);
  }
  __device__ void try_listed(const Fours& fours, int count) {
    __syncwarp();
    bool any = false;
    for (int i = static_cast<int>(threadIdx.x) % 32; i < count; i += 32) {
      const std::int32_t first = fours.first[i];
      const float4 limits = fours.limit[i];
      const base::PhiloxWords w = noise.words(first);
      const float of[4] = {limits.x, limits.y, limits.z, limits.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (!can_win(w.word[k], of[k])) continue;
        try_token(first + k);
        any = true;
      }
    }
    __syncwarp();
    if (__any_sync(0xFFFFFFFFu, any)) bound = warp_best_score(fmaxf(bound, best.score));
  }

  __device__ void finish(std::int64_t first_v) {
    const bool any = candidates != 0;
    for (; candidates != 0; candidates &= candidates - 1) {
      const int i = __ffs(static_cast<int>(candidates)) - 1;
      try_token(first_v + i / 4 * 16 + i % 4);
    }
    if (__any_sync(0xFFFFFFFFu, any)) bound = warp_best_score(fmaxf(bound, best.score));
  }
};

// The lowest token whose z is the largest; a lane sees its blocks in ascending order.
__device__ inline void greedy_group(const float (&z)[kSteps][4], std::int64_t first_v,
                                    float block_max, Draw& best) {
  if (!(block_max > best.score)) return;
#pragma unroll
  for (int i = 4 * kSteps - 1; i >= 0; --i)
    if (z[i / 4][i % 4] == block_max)
      best = {block_max, static_cast<std::int32_t>(first_v + i / 4 * 16 + i % 4)};
}

__device__ inline void keep_best(Draw best, Draw* out) {
  __shared__ Draw of_warp[kBlockThreads / 32];
#pragma unroll
  for (int d = 16; d >= 1; d /= 2) {
    const Draw other{__shfl_xor_sync(0xFFFFFFFFu, best.score, d),
                     __shfl_xor_sync(0xFFFFFFFFu, best.token, d)};
    best = better(best, other);
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kBlockThreads / 32; ++w) best = better(best, of_warp[w]);
  *out = best;
}

// First pass (kSecond false): rows without filters; of the others only the blocks' maxima, over all
// tokens. Second pass: the rows with filters, now that their cuts are known.
template <bool kWide, bool kDraw, bool kSecond>
__global__ __launch_bounds__(kBlockThreads) void blocks_kernel(VocabWork work) {
  const int r = static_cast<int>(blockIdx.x) / work.parts;
  const int part = static_cast<int>(blockIdx.x) % work.parts;
  const RowSampling s = work.sampling[r];
  const bool filtered = filters(s);
  if (kSecond && !filtered) return;
  Cut cut{-kInfinity, -1};
  if (kSecond) {
    cut = work.cuts[r].cut;
    if (numerics::is_nan(work.cuts[r].max)) return;
  }
  const int lane = threadIdx.x % 32, t = lane % 4;
  const bool upper = t >= 2, greedy = s.temperature == 0.0f;
  const std::int64_t V = work.V, row_block = std::int64_t{r} * work.blocks;
  const float* row = work.logits + std::int64_t{r} * V;
  const float inv_t = inverse_temperature(s);
  Sampler sampler{{s.seed, s.stream, static_cast<std::uint64_t>(s.position) << 32},
                  row,
                  V,
                  cut,
                  inv_t,
                  {-kInfinity, kNoToken},
                  -kInfinity,
                  0.0f,
                  0};
  constexpr int kWarps = kBlockThreads / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  __shared__ Fours of_warp[kDraw && kSecond ? kWarps : 1];
  Fours* const fours = of_warp + (kDraw && kSecond ? warp : 0);
  // A warp's eight blocks, a lane's one of them; `visit`: there is one.
  const auto take = [&](int block, bool visit) {
    const std::int64_t first_v = std::int64_t{block} * kBlock + 4 * t;
    float z[kSteps][4];
#pragma unroll
    for (int j = 0; j < kSteps; ++j) load4<kWide>(row, visit ? first_v + 16 * j : V, V, z[j]);
    float max = -kInfinity;
#pragma unroll
    for (int j = 0; j < kSteps; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        z[j][k] = z[j][k] * inv_t;
        if (kSecond && !kept(z[j][k], first_v + 16 * j + k, cut)) z[j][k] = -kInfinity;
        max = max_or_nan(max, z[j][k]);
      }
    max = max_or_nan(max, __shfl_xor_sync(0xFFFFFFFFu, max, 1));
    max = max_or_nan(max, __shfl_xor_sync(0xFFFFFFFFu, max, 2));
    const bool write = visit && t == 0;
    if (write) work.m[row_block + block] = max;
    if (!kSecond && filtered) return;
    const bool noisy = kDraw && !greedy && sampler.start(z, first_v, max);
    float sum, weighted;
    int count = 0;
    if (noisy && kSecond)
      block_sums(z, max, upper, sum, weighted, [&](int j, const float(&p)[4]) {
        sampler.list(j, z[j], p, first_v, *fours, count);
      });
    else if (noisy)
      block_sums(z, max, upper, sum, weighted,
                 [&](int j, const float(&p)[4]) { sampler.step(j, p, first_v); });
    else
      block_sums(z, max, upper, sum, weighted, [](int, const float(&)[4]) {});
    if (write) {
      work.s[row_block + block] = sum;
      work.e[row_block + block] = weighted;
    }
    if (noisy && kSecond)
      sampler.try_listed(*fours, count);
    else if (noisy)
      sampler.finish(first_v);
    if (kDraw && greedy) greedy_group(z, first_v, max, sampler.best);
  };
  // Block `i` of the warp, in the order of its groups.
  const auto block_of = [&](int i) {
    return ((part * work.groups + i / kGroup) * kWarps + warp) * kGroup + i % kGroup;
  };
  const int count = work.groups * kGroup;
  if constexpr (!kSecond) {
    for (int i = 0; i < count && block_of(i) < work.blocks; i += kGroup) {
      const int block = block_of(i) + lane / 4;
      take(block, block < work.blocks);
    }
  } else {
    // Blocks that keep a token wait until there are eight; the others end here.
    __shared__ int waiting[kWarps][kGroup + 32];
    int* const mine = waiting[warp];
    int ready = 0;
    for (int i = 0; i < count; i += 32) {
      const int block = i + lane < count ? block_of(i + lane) : work.blocks;
      const bool keeps = block < work.blocks && work.m[row_block + block] >= cut.z;
      if (block < work.blocks && !keeps) work.m[row_block + block] = -kInfinity;
      const unsigned all = __ballot_sync(0xFFFFFFFFu, keeps);
      if (keeps) mine[ready + __popc(all & ((1u << lane) - 1))] = block;
      ready += __popc(all);
      __syncwarp();
      const bool last = i + 32 >= count;
      while (ready >= kGroup || (last && ready > 0)) {
        const int from = ready > kGroup ? ready - kGroup : 0;
        const bool visit = from + lane / 4 < ready;
        take(visit ? mine[from + lane / 4] : 0, visit);
        ready = from;
      }
      __syncwarp();
    }
  }
  if (kDraw && (kSecond || !filtered)) keep_best(sampler.best, work.draws + blockIdx.x);
}

}  // namespace lockstep::ops::cuda

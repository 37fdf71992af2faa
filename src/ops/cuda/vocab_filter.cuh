// The cut of one row's min-p, top-k and top-p, by one thread block.
//
// The kept set is a prefix of the tokens in the order (key, index), where the key ascends as z
// descends. Tokens are counted and their weights added up in kBins bins of M - z, which follow that
// order; the tokens of the bin in which the prefix ends are then listed, divided into bins of their
// keys, and those of the one that matters ranked against each other. Counts and weights are
// integers, so that nothing depends on the order in which threads arrive. A bin that holds more
// than kListed tokens is searched digit by digit in its keys.
#pragma once

#include "ops/cuda/vocab_row.cuh"

namespace lockstep::ops::cuda {

constexpr int kFilterThreads = 1024;
constexpr int kFilterWarps = kFilterThreads / 32;
constexpr int kBinBits = 10, kBins = 1 << kBinBits;  // a thread a bin
static_assert(kBins == kFilterThreads);
constexpr int kListed = 2048;
// exp2(-kWeightRange * LOG2E) * 2^32 is below 1: tokens further down have no weight in top-p.
constexpr float kWeightRange = 22.25f;

using Sum = unsigned long long;

struct Listed {
  std::uint32_t key;
  std::int32_t index;
};

struct FilterShared {
  std::uint32_t count[kBins];
  std::uint32_t weight_low[kBins], weight_high[kBins];
  Listed listed[kListed];
  std::uint32_t listed_weight[kListed];
  int listed_count;
  Sum warp_sum[kFilterWarps];
  float warp_value[kFilterWarps];
  std::uint32_t lowest_key, highest_key;  // of the list
  // Answers of the searches below.
  int bin;
  Sum left;  // what of the bound remains for the bin
  Cut cut;
};

__device__ inline std::uint32_t descending_key(float z) {
  const std::uint32_t u = numerics::float_bits(z + 0.0f);
  return (u >> 31) != 0 ? u : ~(u | 0x80000000u);
}
__device__ inline float key_value(std::uint32_t key) {
  return numerics::bits_float((key >> 31) != 0 ? key : ~key & 0x7FFFFFFFu);
}

// floor(p * 2^32); 2^32 itself, of the best token, is held as 2^32 - 1, which no other p gives.
__device__ inline std::uint32_t weight_of(float z, float max) {
  const float d = fmaxf(z - max, kFloor);
  return __float2uint_rz(numerics::exp2_nonpositive(d * numerics::kLog2e) * 0x1p32f);
}
__device__ inline Sum weight_value(std::uint32_t w) { return Sum{w} + (w == 0xFFFFFFFFu ? 1 : 0); }

struct FilterRow {
  const VocabWork& work;
  const float* logits;
  const float* block_max;  // over all tokens of a block
  float inv_t, max;
  float scale;  // bins a unit of M - z
  Cut cut;      // tokens outside are not looked at

  __device__ int bin(float z) const {
    return static_cast<int>(fminf((max - z) * scale, static_cast<float>(kBins - 1)));
  }
};

struct Range {
  float lowest, highest;
};

// visit(z, keep, v) for four neighbours at a time, from token v on; keep: which are kept and in a
// range of z. A warp takes a block, and four of them at a time, so that their loads overlap.
template <bool kWide, typename Visit>
__device__ inline void for_each_four(const FilterRow& row, Range range, Visit visit) {
  constexpr int kAtOnce = 4;
  const int lane = threadIdx.x % 32;
  const float lowest = fmaxf(range.lowest, row.cut.z);
  for (int begin = static_cast<int>(threadIdx.x) / 32; begin < row.work.blocks;
       begin += kAtOnce * kFilterWarps) {
    bool look[kAtOnce];
    float x[kAtOnce][4];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int b = begin + i * kFilterWarps;
      look[i] = b < row.work.blocks && row.block_max[b] >= lowest;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const std::int64_t v = std::int64_t{begin + i * kFilterWarps} * kBlock + 4 * lane;
      load4<kWide>(row.logits, look[i] ? v : row.work.V, row.work.V, x[i]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (!look[i]) continue;
      const int v = (begin + i * kFilterWarps) * kBlock + 4 * lane;
      float z[4];
      bool keep[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        z[k] = x[i][k] * row.inv_t;
        keep[k] = (z[k] >= lowest) & (z[k] <= range.highest) & kept(z[k], v + k, row.cut);
      }
      visit(z, keep, v);
    }
  }
}

// visit(z, v) for each of them.
template <bool kWide, typename Visit>
__device__ inline void for_each_kept(const FilterRow& row, Range range, Visit visit) {
  for_each_four<kWide>(row, range, [&](const float(&z)[4], const bool(&keep)[4], int v) {
    if (!(keep[0] | keep[1] | keep[2] | keep[3])) return;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (keep[k]) visit(z[k], v + k);
  });
}

// The sum over all threads.
__device__ inline Sum block_sum(FilterShared& sh, Sum x) {
#pragma unroll
  for (int d = 16; d >= 1; d /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, d);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sh.warp_sum[threadIdx.x / 32] = x;
  __syncthreads();
  Sum sum = 0;
  for (int w = 0; w < kFilterWarps; ++w) sum += sh.warp_sum[w];
  return sum;
}
__device__ inline float block_min(FilterShared& sh, float x) {
#pragma unroll
  for (int d = 16; d >= 1; d /= 2) x = fminf(x, __shfl_xor_sync(0xFFFFFFFFu, x, d));
  __syncthreads();
  if (threadIdx.x % 32 == 0) sh.warp_value[threadIdx.x / 32] = x;
  __syncthreads();
  for (int w = 0; w < kFilterWarps; ++w) x = fminf(x, sh.warp_value[w]);
  return x;
}

// The first thread whose values, summed up with those of all threads before it, reach `bound` (they
// do in all): sh.bin, and in sh.left what remains of the bound for it.
__device__ inline void find_thread(FilterShared& sh, Sum mine, Sum bound) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Sum up_to = mine;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const Sum below = __shfl_up_sync(0xFFFFFFFFu, up_to, d);
    if (lane >= d) up_to += below;
  }
  __syncthreads();
  if (lane == 31) sh.warp_sum[warp] = up_to;
  __syncthreads();
  for (int w = 0; w < warp; ++w) up_to += sh.warp_sum[w];
  if (up_to >= bound && up_to - mine < bound) {
    sh.bin = static_cast<int>(threadIdx.x);
    sh.left = bound - (up_to - mine);
  }
  __syncthreads();
}

__device__ inline Sum bin_weight(const FilterShared& sh) {
  return (Sum{sh.weight_high[threadIdx.x]} << 32) + sh.weight_low[threadIdx.x];
}

__device__ inline void clear_bins(FilterShared& sh) {
  __syncthreads();
  sh.count[threadIdx.x] = sh.weight_low[threadIdx.x] = sh.weight_high[threadIdx.x] = 0;
  __syncthreads();
}
template <int kCount>
__device__ inline void add_to_bins(FilterShared& sh, const int (&bin)[kCount],
                                   const std::uint32_t (&weight)[kCount],
                                   const bool (&counts)[kCount]) {
  std::uint32_t before[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k)
    before[k] = counts[k] ? atomicAdd(&sh.weight_low[bin[k]], weight[k]) : 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    // What the low half holds of 2^32 is one too little.
    const bool whole = weight[k] == 0xFFFFFFFFu;
    if (!(counts[k] & ((before[k] + weight[k] < before[k]) | whole))) continue;
    std::uint32_t high = before[k] + weight[k] < before[k] ? 1 : 0;
    if (whole && atomicAdd(&sh.weight_low[bin[k]], 1u) == 0xFFFFFFFFu) ++high;
    if (high != 0) atomicAdd(&sh.weight_high[bin[k]], high);
  }
}
__device__ inline void add_to_bin(FilterShared& sh, int bin, std::uint32_t weight) {
  add_to_bins<1>(sh, {bin}, {weight}, {true});
}

// What a token counts for: 1 in top-k, its weight in top-p.
template <bool kWeights>
__device__ inline Sum share(float z, float max) {
  return kWeights ? weight_value(weight_of(z, max)) : Sum{1};
}

// Where the prefix ends among the listed tokens: sh.cut. Returns the weights up to there.
template <bool kWeights>
__device__ inline Sum cut_in_list(FilterShared& sh, Sum bound) {
  const int n = sh.listed_count, lane = threadIdx.x % 32;
  const auto share_of = [&](int i) {
    return kWeights ? weight_value(sh.listed_weight[i]) : Sum{1};
  };
  if (threadIdx.x == 0) sh.lowest_key = 0xFFFFFFFFu, sh.highest_key = 0;
  clear_bins(sh);
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kFilterThreads) {
    atomicMin(&sh.lowest_key, sh.listed[i].key);
    atomicMax(&sh.highest_key, sh.listed[i].key);
  }
  __syncthreads();
  // The fewest low bits without which the keys' differences are numbers of bins.
  const std::uint32_t lowest = sh.lowest_key, spread = sh.highest_key - lowest;
  const int shift = max(0, 32 - __clz(static_cast<int>(spread)) - kBinBits);
  const auto bin_of = [&](int i) { return static_cast<int>((sh.listed[i].key - lowest) >> shift); };
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kFilterThreads)
    if (kWeights)
      add_to_bin(sh, bin_of(i), sh.listed_weight[i]);
    else
      atomicAdd(&sh.weight_low[bin_of(i)], 1u);
  __syncthreads();
  find_thread(sh, bin_weight(sh), bound);
  const int bin = sh.bin;
  bound = sh.left;
  // A warp a token of this bin: what is ahead of it there.
  for (int i = static_cast<int>(threadIdx.x) / 32; i < n; i += kFilterWarps) {
    if (bin_of(i) != bin) continue;
    const Listed me = sh.listed[i];
    Sum before = 0;
    for (int j = lane; j < n; j += 32) {
      const Listed other = sh.listed[j];
      const bool ahead = other.key < me.key || (other.key == me.key && other.index < me.index);
      if (ahead && bin_of(j) == bin) before += share_of(j);
    }
#pragma unroll
    for (int d = 16; d >= 1; d /= 2) before += __shfl_xor_sync(0xFFFFFFFFu, before, d);
    if (lane == 0 && before < bound && before + share_of(i) >= bound)
      sh.cut = {key_value(me.key), me.index};
  }
  __syncthreads();
  Sum sum = 0;
  const std::uint32_t last = descending_key(sh.cut.z);
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kFilterThreads) {
    const Listed me = sh.listed[i];
    if (me.key < last || (me.key == last && me.index <= sh.cut.index))
      sum += weight_value(sh.listed_weight[i]);
  }
  return block_sum(sh, sum);
}

// The same over the row, for a bin of many tokens: byte by byte of the key, then by index.
template <bool kWide, bool kWeights>
__device__ inline Sum cut_in_row(FilterShared& sh, const FilterRow& row, int bin, Range range,
                                 Sum bound) {
  std::uint32_t prefix = 0, mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    clear_bins(sh);
    for_each_kept<kWide>(row, range, [&](float z, std::int64_t) {
      const std::uint32_t key = descending_key(z);
      if (row.bin(z) != bin || (key & mask) != prefix) return;
      const int digit = static_cast<int>(key >> shift & 255u);
      if (kWeights)
        add_to_bin(sh, digit, weight_of(z, row.max));
      else
        atomicAdd(&sh.weight_low[digit], 1u);
    });
    __syncthreads();
    find_thread(sh, bin_weight(sh), bound);
    prefix |= static_cast<std::uint32_t>(sh.bin) << shift;
    mask |= 255u << shift;
    bound = sh.left;
  }
  // Of the tokens with this z, which all count the same, the one that reaches the bound.
  const float z = key_value(prefix);
  const Sum each = share<kWeights>(z, row.max);
  const Sum wanted = (bound + each - 1) / each;
  Sum before = 0;
  for (std::int64_t base = 0; before < wanted && base < row.work.V; base += kFilterThreads) {
    const std::int64_t v = base + threadIdx.x;
    const bool here = v < row.work.V && row.logits[v] * row.inv_t == z;
    const Sum tile = static_cast<Sum>(__syncthreads_count(here));
    if (before + tile >= wanted) {
      find_thread(sh, here ? 1 : 0, wanted - before);
      if (threadIdx.x == 0) sh.cut = {z, static_cast<std::int32_t>(base + sh.bin)};
      __syncthreads();
    }
    before += tile;
  }
  Sum sum = 0;
  for_each_kept<kWide>(row, range, [&](float x, std::int64_t v) {
    if (row.bin(x) == bin && kept(x, v, sh.cut)) sum += weight_value(weight_of(x, row.max));
  });
  return block_sum(sh, sum);
}

// Ends the prefix inside `bin`, where `bound` is still to be reached: sh.cut; returns the weights
// of the bin's tokens up to there. `slack`: more than any error of a bin's bounds.
template <bool kWide, bool kWeights>
__device__ inline Sum cut_in_bin(FilterShared& sh, const FilterRow& row, int bin, Range range,
                                 float slack, Sum bound) {
  __syncthreads();
  if (threadIdx.x == 0) sh.listed_count = 0;
  __syncthreads();
  if (bin < kBins - 1) {  // a NaN of huge numbers leaves the range as it is
    const float above = static_cast<float>(bin) / row.scale - slack,
                below = static_cast<float>(bin + 1) / row.scale + slack;
    range = {fmaxf(range.lowest, row.max - below), fminf(range.highest, row.max - above)};
  }
  for_each_kept<kWide>(row, range, [&](float z, std::int64_t v) {
    if (row.bin(z) != bin) return;
    const int at = atomicAdd(&sh.listed_count, 1);
    if (at >= kListed) return;
    sh.listed[at] = {descending_key(z), static_cast<std::int32_t>(v)};
    sh.listed_weight[at] = weight_of(z, row.max);
  });
  __syncthreads();
  if (sh.listed_count > kListed) return cut_in_row<kWide, kWeights>(sh, row, bin, range, bound);
  return cut_in_list<kWeights>(sh, bound);
}

// min-p: the lowest z of enough probability, with all its equals.
template <bool kWide>
__device__ inline Cut cut_min_p(FilterShared& sh, const FilterRow& row, float min_p) {
  const float bound = min_p < 1.0f ? min_p : 1.0f;
  // No z below this one has it; the subtrahend is more than any error of the two logarithms.
  const float lowest = row.max + numerics::log(bound) - (0.01f + fabsf(row.max) * 1e-5f);
  float low = row.max;
  for_each_kept<kWide>(row, {lowest, kInfinity}, [&](float z, std::int64_t) {
    if (z < low && relative_probability(z, row.max) >= bound) low = z;
  });
  return {block_min(sh, low) + 0.0f, static_cast<std::int32_t>(row.work.V - 1)};
}

// The best k + 1 tokens are not below this: as many blocks have a maximum above it. -inf where
// there are not so many blocks.
__device__ inline float lowest_of_top_k(FilterShared& sh, const FilterRow& row, int k) {
  clear_bins(sh);
  for (int b = static_cast<int>(threadIdx.x); b < row.work.blocks; b += kFilterThreads) {
    const float m = row.block_max[b];
    if (m > -kInfinity && m >= row.cut.z) atomicAdd(&sh.count[row.bin(m)], 1u);
  }
  __syncthreads();
  const Sum mine = threadIdx.x < kBins - 1 ? sh.count[threadIdx.x] : 0;
  if (block_sum(sh, mine) <= static_cast<Sum>(k)) return -kInfinity;
  find_thread(sh, mine, static_cast<Sum>(k) + 1);
  return row.max - static_cast<float>(sh.bin + 2) / row.scale;
}

template <bool kWide>
__device__ inline Cut find_cut(FilterShared& sh, FilterRow& row, const RowSampling& s,
                               float lowest_block_max) {
  if (s.min_p > 0.0f) row.cut = cut_min_p<kWide>(sh, row, s.min_p);
  const bool by_count = s.top_k > 0, by_weight = s.top_p < 1.0f;
  if (!by_count && !by_weight) return row.cut;

  // With top-p nothing matters beyond the range that has weights: what top-k cuts off there has
  // none. Without it the bins span twice the blocks' maxima; what lies below is in the last bin.
  const float span = by_weight ? kWeightRange : 2.0f * (row.max - lowest_block_max);
  row.scale = static_cast<float>(kBins - 1) / fmaxf(span, 1e-6f);
  const float slack = 0.01f + (fabsf(row.max) + span) * 1e-5f;
  Range range{by_weight ? row.max - kWeightRange - slack : -kInfinity, kInfinity};
  if (by_count) range.lowest = fmaxf(range.lowest, lowest_of_top_k(sh, row, s.top_k) - slack);
  clear_bins(sh);
  for_each_four<kWide>(row, range, [&](const float(&z)[4], const bool(&keep)[4], int) {
    int bin[4];
    bool counts[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      bin[k] = row.bin(z[k]);
      counts[k] = keep[k] & (!by_weight | (bin[k] != kBins - 1));
    }
    if (by_weight) {
      std::uint32_t weight[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) weight[k] = weight_of(z[k], row.max);
      add_to_bins(sh, bin, weight, counts);
    }
    if (by_count) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (counts[k]) atomicAdd(&sh.count[bin[k]], 1u);
    }
  });
  __syncthreads();

  const std::uint32_t my_count = sh.count[threadIdx.x];
  const Sum my_weight = bin_weight(sh);
  Sum total = by_weight ? block_sum(sh, my_weight) : 0;
  Cut found = row.cut;
  if (by_count && block_sum(sh, my_count) > static_cast<Sum>(s.top_k)) {
    find_thread(sh, my_count, static_cast<Sum>(s.top_k));
    const int bin = sh.bin;
    const Sum left = sh.left;
    const Sum in_bin = cut_in_bin<kWide, false>(sh, row, bin, range, slack, left);
    found = sh.cut;
    if (by_weight)
      total = block_sum(sh, static_cast<int>(threadIdx.x) < bin ? my_weight : 0) + in_bin;
  }
  if (by_weight) {
    const double bound = ceil(static_cast<double>(s.top_p) * static_cast<double>(total));
    find_thread(sh, my_weight, bound > 1.0 ? static_cast<Sum>(bound) : 1);
    const int bin = sh.bin;
    const Sum left = sh.left;
    row.cut = found;
    cut_in_bin<kWide, true>(sh, row, bin, range, slack, left);
    found = sh.cut;
  }
  return found;
}

template <bool kWide>
__global__ __launch_bounds__(kFilterThreads) void filter_kernel(VocabWork work) {
  extern __shared__ __align__(16) unsigned char memory[];
  FilterShared& sh = *reinterpret_cast<FilterShared*>(memory);
  const int r = static_cast<int>(blockIdx.x);
  const RowSampling s = work.sampling[r];
  if (!filters(s)) return;
  FilterRow row{work,
                work.logits + std::int64_t{r} * work.V,
                work.m + std::int64_t{r} * work.blocks,
                inverse_temperature(s),
                -kInfinity,
                0.0f,
                {-kInfinity, -1}};
  float max = -kInfinity, low = kInfinity;
  for (int b = static_cast<int>(threadIdx.x); b < work.blocks; b += kFilterThreads) {
    const float m = row.block_max[b];
    max = max_or_nan(max, m);
    if (m > -kInfinity) low = fminf(low, m);
  }
  max = warp_max_or_nan(max);
  if (threadIdx.x % 32 == 0) sh.warp_value[threadIdx.x / 32] = max;
  __syncthreads();
  for (int w = 0; w < kFilterWarps; ++w) max = max_or_nan(max, sh.warp_value[w]);
  row.max = max + 0.0f;
  const bool broken = !numerics::is_finite(max);
  low = block_min(sh, low);
  const Cut cut = broken ? row.cut : find_cut<kWide>(sh, row, s, low);
  if (threadIdx.x == 0)
    work.cuts[r] = {broken ? std::numeric_limits<float>::quiet_NaN() : row.max, cut};
}

}  // namespace lockstep::ops::cuda

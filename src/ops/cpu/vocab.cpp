// A row is walked in blocks of 128 tokens. Tokens outside the kept set, and the end of a ragged
// block, are loaded as -inf: their exponential is +0, so they need no further care.
#include "ops/cpu/vocab.h"

#include <omp.h>

#include "base/philox.h"
#include "numerics/reduce.h"

namespace lockstep::ops::cpu::LOCKSTEP_ISA {

namespace {

constexpr int kBlock = numerics::kVocabBlock;
constexpr int kLanes = 32;  // above what gcc unrolls completely, so that it vectorises instead
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kFloor = -128.0f;  // exp2(kFloor * LOG2E) = 0, and so is all below

struct Row {
  const float* logits;
  std::int64_t V;
  float inv_t;
  float cut_z = -kInfinity;
  std::int32_t cut_index = -1;

  float z(std::int64_t v) const { return logits[v] * inv_t; }
  bool kept(std::int64_t v) const { return z(v) > cut_z || (z(v) == cut_z && v <= cut_index); }
};

bool filters(const RowSampling& s) {
  return s.temperature != 0.0f && (s.min_p > 0.0f || s.top_k > 0 || s.top_p < 1.0f);
}

Row make_row(const float* logits, std::int64_t V, const RowSampling& s) {
  return {logits, V, s.temperature == 0.0f ? 1.0f : 1.0f / s.temperature};
}

float block_max(const float* z) {
  float lane[kLanes];
  for (int l = 0; l < kLanes; ++l) lane[l] = z[l];
  for (int i = kLanes; i < kBlock; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] = z[i + l] > lane[l] ? z[i + l] : lane[l];
  float max = lane[0];
  for (int l = 1; l < kLanes; ++l) max = lane[l] > max ? lane[l] : max;
  return max;
}

// z of the kept tokens of block b, -inf elsewhere.
void load_block(const Row& row, std::int64_t b, float* z) {
  const std::int64_t left = row.V - b * kBlock;
  const int n = left < kBlock ? static_cast<int>(left) : kBlock;
  const float* logits = row.logits + b * kBlock;
  const std::int32_t last = row.cut_index - static_cast<std::int32_t>(b * kBlock);
  for (int i = 0; i < n; ++i) {
    const float x = logits[i] * row.inv_t;
    const bool keep = (x > row.cut_z) | ((x == row.cut_z) & (i <= last));
    z[i] = keep ? x : -kInfinity;
  }
  for (int i = n; i < kBlock; ++i) z[i] = -kInfinity;
}

std::int64_t block_count(const Row& row) { return (row.V + kBlock - 1) / kBlock; }

// Largest z, never -0; NaN for a broken row.
float row_max(const Row& row) {
  float lane[kLanes];
  std::int32_t nan[kLanes] = {};
  for (int l = 0; l < kLanes; ++l) lane[l] = -kInfinity;
  const std::int64_t whole = row.V / kLanes * kLanes;
  for (std::int64_t v = 0; v < whole; v += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const float z = row.z(v + l);
      lane[l] = z > lane[l] ? z : lane[l];
      nan[l] = z != z ? 1 : nan[l];
    }
  for (std::int64_t v = whole; v < row.V; ++v) {
    const float z = row.z(v);
    lane[0] = z > lane[0] ? z : lane[0];
    nan[0] = z != z ? 1 : nan[0];
  }
  bool broken = false;
  float max = -kInfinity;
  for (int l = 0; l < kLanes; ++l) {
    max = lane[l] > max ? lane[l] : max;
    broken = broken || nan[l] != 0;
  }
  return broken || !numerics::is_finite(max) ? kNan : max + 0.0f;
}

float relative_probability(float z, float max) {
  return numerics::exp2((z - max) * numerics::kLog2e);
}

// Ascending key = descending z; -0 and +0 are one.
std::uint32_t descending_key(float z) {
  const std::uint32_t u = numerics::float_bits(z + 0.0f);
  return (u >> 31) != 0 ? u : ~(u | 0x80000000u);
}
float key_value(std::uint32_t key) {
  return numerics::bits_float((key >> 31) != 0 ? key : ~key & 0x7FFFFFFFu);
}

// The cut after the shortest prefix, in the order (key, index), whose weights reach `bound`; they
// do in all. One histogram of weights for each byte of the key: integer sums need no order.
void cut_prefix(const std::uint32_t* keys, const std::uint64_t* weights, std::uint64_t bound,
                Row& row) {
  std::uint32_t prefix = 0, mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    std::uint64_t sum[256] = {};
    for (std::int64_t v = 0; v < row.V; ++v)
      if ((keys[v] & mask) == prefix) sum[keys[v] >> shift & 255u] += weights[v];
    std::uint32_t digit = 0;
    while (digit < 255 && sum[digit] < bound) bound -= sum[digit++];
    prefix |= digit << shift;
    mask |= 255u << shift;
  }
  row.cut_z = key_value(prefix);
  for (std::int64_t v = 0; v < row.V; ++v) {
    if (keys[v] != prefix || weights[v] == 0) continue;
    row.cut_index = static_cast<std::int32_t>(v);
    if (weights[v] >= bound) return;
    bound -= weights[v];
  }
}

// The lowest z whose probability relative to the best is at least min_p, with all its equals.
void apply_min_p(float min_p, float max, Row& row) {
  const float bound = min_p < 1.0f ? min_p : 1.0f;
  float lane[kLanes];
  for (int l = 0; l < kLanes; ++l) lane[l] = max;
  const std::int64_t whole = row.V / kLanes * kLanes;
  for (std::int64_t v = 0; v < whole; v += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const float z = row.z(v + l);
      lane[l] = (z < lane[l]) & (relative_probability(z, max) >= bound) ? z : lane[l];
    }
  for (std::int64_t v = whole; v < row.V; ++v)
    if (row.z(v) < lane[0] && relative_probability(row.z(v), max) >= bound) lane[0] = row.z(v);
  for (int l = 1; l < kLanes; ++l) lane[0] = lane[l] < lane[0] ? lane[l] : lane[0];
  row.cut_z = lane[0] + 0.0f;
  row.cut_index = static_cast<std::int32_t>(row.V - 1);
}

void apply_filters(const RowSampling& s, float max, std::uint32_t* keys, std::uint64_t* weights,
                   Row& row) {
  if (s.min_p > 0.0f) apply_min_p(s.min_p, max, row);
  for (std::int64_t v = 0; v < row.V; ++v) keys[v] = descending_key(row.z(v));
  if (s.top_k > 0) {
    std::uint64_t count = 0;
    for (std::int64_t v = 0; v < row.V; ++v) {
      weights[v] = row.kept(v) ? 1 : 0;
      count += weights[v];
    }
    if (count > static_cast<std::uint64_t>(s.top_k))
      cut_prefix(keys, weights, static_cast<std::uint64_t>(s.top_k), row);
  }
  if (s.top_p < 1.0f) {
    std::uint64_t sum = 0;
    for (std::int64_t v = 0; v < row.V; ++v) {
      const auto p = static_cast<std::int64_t>(relative_probability(row.z(v), max) * 0x1p32f);
      weights[v] = row.kept(v) ? static_cast<std::uint64_t>(p) : 0;
      sum += weights[v];
    }
    const double bound = std::ceil(static_cast<double>(s.top_p) * static_cast<double>(sum));
    cut_prefix(keys, weights, bound > 1.0 ? static_cast<std::uint64_t>(bound) : 1, row);
  }
}

// s_b = sum of p, e_b = sum of p * (z - m_b), p = exp2((z - m_b) * LOG2E).
void block_sums(const float* z, float max, float& s, float& e) {
  float p[kBlock], pd[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    float d = z[i] - max;
    d = d > kFloor ? d : kFloor;
    p[i] = numerics::exp2(d * numerics::kLog2e);
    pd[i] = p[i] * d;
  }
  float p_lane[4] = {}, pd_lane[4] = {};
  numerics::quad_accumulate(p, kBlock, p_lane);
  numerics::quad_accumulate(pd, kBlock, pd_lane);
  s = numerics::quad_total(p_lane);
  e = numerics::quad_total(pd_lane);
}

void row_sums(const Row& row, RowStats& stats) {
  float total[32] = {}, entropy[32] = {};
  float z[kBlock];
  for (std::int64_t b = 0; b < block_count(row); ++b) {
    load_block(row, b, z);
    const float m = block_max(z);
    if (m == -kInfinity) continue;
    float s, e;
    block_sums(z, m, s, e);
    float d = m - stats.max;
    d = d > kFloor ? d : kFloor;
    const float w = numerics::exp2(d * numerics::kLog2e);
    total[b % 32] = numerics::fma(s, w, total[b % 32]);
    entropy[b % 32] = numerics::fma(numerics::fma(s, d, e), w, entropy[b % 32]);
  }
  stats.total = numerics::butterfly_sum(total);
  stats.entropy = numerics::log(stats.total) - numerics::butterfly_sum(entropy) / stats.total;
}

// score = z + Gumbel noise of tokens [128 b, 128 b + 128).
void noisy_scores(const RowSampling& s, std::int64_t b, const float* z, float* score) {
  constexpr int kCounters = kBlock / 4;
  std::uint32_t word[kBlock];
  const std::uint64_t low = static_cast<std::uint64_t>(s.position) << 32;
  for (int i = 0; i < kCounters; ++i) {
    const base::PhiloxWords w =
        base::philox4x32(s.seed, s.stream, low | static_cast<std::uint64_t>(b * kCounters + i));
    for (int k = 0; k < 4; ++k) word[4 * i + k] = w.word[k];
  }
  for (int i = 0; i < kBlock; ++i) {
    const float u = (static_cast<float>(static_cast<std::int32_t>(word[i] >> 9)) + 0.5f) * 0x1p-23f;
    score[i] = z[i] - numerics::log(-numerics::log(u));
  }
}

std::int32_t draw_token(const Row& row, const RowSampling& s, float max) {
  float z[kBlock], score[kBlock], best = -kInfinity;
  std::int64_t token = 0;
  for (std::int64_t b = 0; b < block_count(row); ++b) {
    load_block(row, b, z);
    const float m = block_max(z);
    if (m == -kInfinity) continue;
    const bool greedy = s.temperature == 0.0f;
    if (greedy && m < max) continue;
    if (!greedy) noisy_scores(s, b, z, score);
    const float* value = greedy ? z : score;
    const float top = greedy ? m : block_max(score);
    if (!(top > best)) continue;
    best = top;
    int i = 0;
    while (i < kBlock - 1 && value[i] != top) ++i;
    token = b * kBlock + i;
  }
  return static_cast<std::int32_t>(token);
}

std::int32_t first_number(const Row& row) {
  for (std::int64_t v = 0; v < row.V; ++v)
    if (!numerics::is_nan(row.z(v))) return static_cast<std::int32_t>(v);
  return 0;
}

void one_row(Row row, const RowSampling& s, bool draw, std::uint32_t* keys, std::uint64_t* weights,
             std::int32_t& token, RowStats& stats) {
  const float max = row_max(row);
  stats.max = max;
  if (numerics::is_nan(max)) {
    if (draw) token = first_number(row);
    stats.logprob = stats.entropy = stats.total = kNan;
  } else {
    if (filters(s)) apply_filters(s, max, keys, weights, row);
    if (draw) token = draw_token(row, s, max);
    row_sums(row, stats);
    stats.logprob =
        row.kept(token) ? (row.z(token) - max) - numerics::log(stats.total) : -kInfinity;
  }
  stats.cut_z = row.cut_z;
  stats.cut_index = row.cut_index;
}

void fill(numerics::Bf16* out, std::int64_t n, std::uint16_t bits) {
  for (std::int64_t i = 0; i < n; ++i) out[i].bits = bits;
}

void backward_row(const Row& row, const RowStats& stats, std::int32_t target, float g,
                  numerics::Bf16* out) {
  if (g == 0.0f || stats.logprob == -kInfinity) return fill(out, row.V, 0);
  if (numerics::is_nan(stats.logprob)) return fill(out, row.V, 0x7FFF);
  const auto last = static_cast<std::int64_t>(row.cut_index);
  for (std::int64_t b = 0; b < block_count(row); ++b) {
    const std::int64_t begin = b * kBlock;
    const int n = row.V - begin < kBlock ? static_cast<int>(row.V - begin) : kBlock;
    const auto block_last = static_cast<std::int32_t>(last - begin);
    for (int i = 0; i < n; ++i) {
      const float z = row.logits[begin + i] * row.inv_t;
      const bool keep = (z > row.cut_z) | ((z == row.cut_z) & (i <= block_last));
      const float p = numerics::exp2((z - stats.max) * numerics::kLog2e) / stats.total;
      const numerics::Bf16 d = numerics::to_bf16(((0.0f - p) * g) * row.inv_t);
      out[begin + i].bits = keep ? d.bits : static_cast<std::uint16_t>(0);
    }
  }
  const float p = numerics::exp2((row.z(target) - stats.max) * numerics::kLog2e) / stats.total;
  out[target] = numerics::to_bf16(((1.0f - p) * g) * row.inv_t);
}

}  // namespace

void vocab_rows(int threads, const float* logits, std::int64_t R, std::int64_t V,
                const RowSampling* sampling, bool draw, const VocabScratch& scratch,
                std::int32_t* tokens, RowStats* stats) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t r = 0; r < R; ++r) {
    const std::int64_t offset = omp_get_thread_num() * V;
    one_row(make_row(logits + r * V, V, sampling[r]), sampling[r], draw, scratch.keys + offset,
            scratch.weights + offset, tokens[r], stats[r]);
  }
}

void vocab_backward(int threads, const float* logits, std::int64_t R, std::int64_t V,
                    const std::int32_t* targets, const RowSampling* sampling, const RowStats* stats,
                    const float* g, numerics::Bf16* d_logits) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t r = 0; r < R; ++r) {
    Row row = make_row(logits + r * V, V, sampling[r]);
    row.cut_z = stats[r].cut_z;
    row.cut_index = stats[r].cut_index;
    backward_row(row, stats[r], targets[r], g[r], d_logits + r * V);
  }
}

}  // namespace lockstep::ops::cpu::LOCKSTEP_ISA

// ops/vocab.h: log-probabilities, filters, sampling and their gradient.
#include "ops/vocab.h"

#include <algorithm>
#include <set>

#include "base/philox.h"
#include "numerics/reduce.h"
#include "ops/op_test_util.h"
#include "ops/reference/vocab.h"

namespace lockstep::ops::test {
namespace {

constexpr double kUlp = 0x1p-24;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

RowSampling settings(float temperature, int top_k = -1, float top_p = 1, float min_p = 0) {
  RowSampling s;
  s.temperature = temperature;
  s.top_k = top_k;
  s.top_p = top_p;
  s.min_p = min_p;
  return s;
}

const std::vector<RowSampling> kPlain = {settings(1), settings(0.7f), settings(1.7f), settings(0)};
const std::vector<RowSampling> kFiltered = {settings(1, 1),
                                            settings(1, 5),
                                            settings(0.7f, -1, 0.9f),
                                            settings(1, -1, 0),
                                            settings(1.3f, 40, 0.5f),
                                            settings(1, -1, 1, 0.05f),
                                            settings(1, -1, 1, 2),
                                            settings(0.9f, 20, 0.8f, 0.01f),
                                            settings(1, 100000, 0.999f)};

// Logits of one row a setting, all from one stream; some are -inf, some are equal.
Tensor make_logits(std::int64_t R, std::int64_t V, std::uint64_t seed) {
  Rng rng(seed);
  Tensor z = random_normal(rng, DType::kFp32, {R, V}, 3.0);
  for (std::int64_t i = 0; i < R * V; ++i) {
    const double x = uniform(rng);
    if (i % V != 0 && x < 0.05) z.as<float>()[i] = -kInf;
    if (i % V != 0 && x > 0.9) z.as<float>()[i] = z.as<float>()[i - 1];
  }
  return z;
}

std::vector<double> row(const TensorView& x, std::int64_t r) { return values(x.rows(r, 1)); }

bool is_kept(const RowStats& s, float z, std::int64_t v) {
  return z > s.cut_z || (z == s.cut_z && v <= s.cut_index);
}

float scaled(float logit, const RowSampling& s) {
  return logit * (s.temperature == 0.0f ? 1.0f : 1.0f / s.temperature);
}

// What rounding can do to one row: to z, to the relative value of a p or of the total, to log p.
struct Bound {
  double z, relative, logprob, entropy;
};
Bound row_bound(const reference::Distribution& d, int target) {
  double magnitude = 0, spread = 0, mean = 0;
  const double max = d.z[d.kept[0]];
  for (const int v : d.kept) {
    magnitude = std::max(magnitude, std::abs(d.z[v]));
    spread = std::max(spread, std::min(104.0, max - d.z[v]));
    mean += d.p[v] * (max - d.z[v]);
  }
  const double blocks = static_cast<double>(d.z.size()) / 128;
  const double log_total = std::abs(d.logprob[d.kept[0]]);
  Bound b;
  b.z = 2 * kUlp * magnitude;
  b.relative = 2 * (3 * kUlp * spread + 0x1p-22) + 2 * b.z + (19 + blocks / 32 + 8) * kUlp;
  const double distance = target < 0 ? 0 : max - d.z[target];
  b.logprob = 2 * b.z + b.relative + kUlp * distance + (0x1p-22 + 2 * kUlp) * (log_total + 1) +
              kUlp * (distance + log_total);
  b.entropy = b.relative + 2 * (b.relative + b.z + kUlp * spread) * (1 + mean) +
              (0x1p-22 + 2 * kUlp) * (log_total + 1);
  return b;
}

const std::vector<std::int64_t> kSizes = {1, 2, 3, 127, 128, 129, 255, 256, 257, 1009, 8191};

TEST(Vocab, LogprobsAgainstReference) {
  tensor::Arena arena;
  const Context ctx = context(arena, Isa::kPortable);
  for (const auto& all : {kPlain, kFiltered})
    for (const std::int64_t V : kSizes) {
      const std::int64_t R = static_cast<std::int64_t>(all.size());
      const Tensor logits = make_logits(R, V, 7 + V);
      const Tensor targets = empty(DType::kInt32, {R});
      std::vector<reference::Distribution> expected;
      for (std::int64_t r = 0; r < R; ++r) {
        expected.push_back(reference::vocab(row(logits, r), all[r]));
        targets.as<std::int32_t>()[r] = expected[r].kept[expected[r].kept.size() / 2];
      }
      std::vector<RowStats> stats(R);
      vocab_logprobs(ctx, logits, targets, all.data(), stats.data());
      for (std::int64_t r = 0; r < R; ++r) {
        const auto& d = expected[r];
        const int target = targets.as<std::int32_t>()[r];
        const Bound b = row_bound(d, target);
        const std::string where = fmt::format("V {} row {}", V, r);
        EXPECT_LE(std::abs(static_cast<double>(stats[r].logprob) - d.logprob[target]), b.logprob)
            << where;
        EXPECT_LE(std::abs(static_cast<double>(stats[r].entropy) - d.entropy), b.entropy) << where;
        EXPECT_LE(std::abs(static_cast<double>(stats[r].max) - d.z[d.kept[0]]), b.z) << where;
        const std::set<int> kept(d.kept.begin(), d.kept.end());
        for (std::int64_t v = 0; v < V; ++v)
          ASSERT_EQ(is_kept(stats[r], scaled(logits.as<float>()[r * V + v], all[r]), v),
                    kept.count(static_cast<int>(v)) == 1)
              << where << " token " << v;
      }
    }
}

TEST(Vocab, TokensOutsideTheKeptSetHaveMinusInfinity) {
  tensor::Arena arena;
  const std::int64_t V = 40;
  const Tensor one = make_logits(1, V, 21), logits = empty(DType::kFp32, {V, V}),
               targets = empty(DType::kInt32, {V});
  for (std::int64_t r = 0; r < V; ++r) {
    std::copy_n(one.as<float>(), V, logits.as<float>() + r * V);
    targets.as<std::int32_t>()[r] = static_cast<std::int32_t>(r);
  }
  for (const RowSampling& s : kFiltered) {
    std::vector<RowStats> stats(V);
    vocab_logprobs(tensor::cpu_context(arena, 1), logits, targets,
                   std::vector<RowSampling>(V, s).data(), stats.data());
    const auto d = reference::vocab(row(one, 0), s);
    double sum = 0;
    for (std::int64_t v = 0; v < V; ++v) {
      EXPECT_EQ(stats[v].logprob == -kInf, d.p[v] == 0.0) << v;
      sum += std::exp(static_cast<double>(stats[v].logprob));
    }
    EXPECT_LE(std::abs(sum - 1), 1e-5);
  }
}

TEST(Vocab, BackwardAgainstReference) {
  tensor::Arena arena;
  const Context ctx = context(arena, Isa::kPortable);
  for (const auto& all : {kPlain, kFiltered})
    for (const std::int64_t V : kSizes) {
      const std::int64_t R = static_cast<std::int64_t>(all.size());
      const Tensor logits = make_logits(R, V, 31 + V), tokens = empty(DType::kInt32, {R});
      std::vector<RowStats> stats(R);
      vocab_sample(ctx, logits, all.data(), tokens, stats.data());
      Rng rng(V);
      const Tensor g = random_normal(rng, DType::kFp32, {R});
      const Poisoned d_logits(DType::kBf16, {R, V});
      vocab_backward(ctx, logits, tokens, all.data(), stats.data(), g, d_logits);
      EXPECT_TRUE(d_logits.guards_intact() && d_logits.all_written());
      for (std::int64_t r = 0; r < R; ++r) {
        const auto d = reference::vocab(row(logits, r), all[r]);
        const int target = tokens.as<std::int32_t>()[r];
        ASSERT_GT(d.p[target], 0.0);
        const auto expected = reference::vocab_backward(d, target, get_value(g, r), all[r]);
        const Bound b = row_bound(d, target);
        const double t = all[r].temperature == 0 ? 1 : static_cast<double>(all[r].temperature);
        const auto got = row(d_logits, r);
        for (std::int64_t v = 0; v < V; ++v) {
          const double error = std::abs(get_value(g, r)) / t *
                               (d.p[v] * (b.relative + 2 * b.z + 0x1p-22 + 4 * kUlp * 104) +
                                3 * kUlp * std::abs(expected[v]) + kUlp);
          EXPECT_LE(std::abs(got[v] - expected[v]),
                    error + 0x1.01p-8 * std::abs(expected[v]) + 0x1p-133)
              << "V " << V << " row " << r << " token " << v;
          if (d.p[v] == 0.0) {
            EXPECT_EQ(d_logits.view().as<numerics::Bf16>()[r * V + v].bits, 0);
          }
        }
      }
    }
}

TEST(Vocab, ReferenceBackwardAgainstDifferences) {
  for (const auto& all : {kPlain, kFiltered})
    for (std::size_t r = 0; r < all.size(); ++r) {
      auto x = row(make_logits(1, 37, 50 + r), 0);
      const auto kept = reference::vocab(x, all[r]).kept;
      const int target = kept[kept.size() / 2];
      const auto gradient =
          reference::vocab_backward(reference::vocab_over(x, all[r], kept), target, 1.5, all[r]);
      for (std::size_t v = 0; v < x.size(); ++v) {
        if (std::isinf(x[v])) continue;
        const double keep = x[v], h = 1e-4;
        x[v] = keep + h;
        const double up = reference::vocab_over(x, all[r], kept).logprob[target];
        x[v] = keep - h;
        const double down = reference::vocab_over(x, all[r], kept).logprob[target];
        x[v] = keep;
        EXPECT_LE(std::abs(1.5 * (up - down) / (2 * h) - gradient[v]), 1e-7);
      }
    }
}

struct Result {
  Tensor tokens, d_logits, g;
  std::vector<RowStats> stats, again;
};

Result run(const Context& ctx, const TensorView& logits, const std::vector<RowSampling>& all,
           std::int64_t begin, std::int64_t count) {
  const std::int64_t V = logits.dim(1);
  Result out{empty(DType::kInt32, {count}), empty(DType::kBf16, {count, V}), Tensor{},
             std::vector<RowStats>(count), std::vector<RowStats>(count)};
  const TensorView rows = logits.rows(begin, count);
  Rng rng(5);
  out.g = random_normal(rng, DType::kFp32, {logits.dim(0)});
  vocab_sample(ctx, rows, all.data() + begin, out.tokens, out.stats.data());
  vocab_logprobs(ctx, rows, out.tokens, all.data() + begin, out.again.data());
  vocab_backward(ctx, rows, out.tokens, all.data() + begin, out.stats.data(),
                 out.g.view().rows(begin, count), out.d_logits);
  return out;
}

std::vector<RowSampling> mixed_rows(std::int64_t R) {
  std::vector<RowSampling> all;
  for (std::int64_t r = 0; r < R; ++r) {
    const auto& from = r % 2 == 0 ? kPlain : kFiltered;
    all.push_back(from[static_cast<std::size_t>(r / 2) % from.size()]);
    all.back().seed = 77;
    all.back().stream = static_cast<std::uint64_t>(r) << 33 | 5;
    all.back().position = static_cast<std::uint32_t>(r);
  }
  return all;
}

TEST(Vocab, SameBytesForIsaThreadsAndNeighbours) {
  tensor::Arena arena;
  for (const std::int64_t V : {5, 257, 1031}) {
    const std::int64_t R = 33;
    const Tensor logits = make_logits(R, V, 60);
    const auto all = mixed_rows(R);
    const Result base = run(context(arena, Isa::kPortable), logits, all, 0, R);
    const auto same = [](const std::vector<RowStats>& a, const RowStats* b, std::size_t n) {
      return std::memcmp(a.data(), b, n * sizeof(RowStats)) == 0;
    };
    EXPECT_TRUE(same(base.again, base.stats.data(), R));  // while sampling and in the loss
    for (const Isa isa : supported_isas())
      for (const int threads : {1, 2}) {
        const Result other = run(context(arena, isa, threads), logits, all, 0, R);
        EXPECT_TRUE(bytes_equal(base.tokens, other.tokens)) << tensor::isa_name(isa);
        EXPECT_TRUE(bytes_equal(base.d_logits, other.d_logits)) << tensor::isa_name(isa);
        EXPECT_TRUE(same(base.stats, other.stats.data(), R)) << tensor::isa_name(isa);
        EXPECT_TRUE(same(base.stats, other.again.data(), R)) << tensor::isa_name(isa);
      }
    for (std::int64_t r = 0; r < R; ++r) {
      const Result alone = run(context(arena, tensor::best_isa()), logits, all, r, 1);
      EXPECT_TRUE(bytes_equal(base.tokens.view().rows(r, 1), alone.tokens)) << r;
      EXPECT_TRUE(bytes_equal(base.d_logits.view().rows(r, 1), alone.d_logits)) << r;
      EXPECT_TRUE(same(alone.stats, base.stats.data() + r, 1)) << r;
    }
  }
}

// The contract's text as plain loops: sums over the kept set, log-probability, entropy, draw.
RowStats written_stats(const float* logits, std::int64_t V, const RowSampling& s,
                       const RowStats& cut, std::int32_t target) {
  float total[32] = {}, entropy[32] = {}, max = -kInf;
  const auto z = [&](std::int64_t v) { return scaled(logits[v], s); };
  for (std::int64_t v = 0; v < V; ++v) max = std::max(max, z(v));
  for (std::int64_t b = 0; b * 128 < V; ++b) {
    float m = -kInf, p[4] = {}, e[4] = {};
    const auto kept = [&](std::int64_t v) { return v < V && is_kept(cut, z(v), v); };
    for (std::int64_t v = 128 * b; v < 128 * b + 128; ++v)
      if (kept(v)) m = std::max(m, z(v));
    if (m == -kInf) continue;
    for (int pair = 0; pair < 64; ++pair) {
      float pp[2] = {}, ee[2] = {};
      for (int k = 0; k < 2; ++k) {
        const std::int64_t v = 128 * b + 2 * pair + k;
        if (!kept(v)) continue;
        const float d = std::max(z(v) - m, -128.0f);
        pp[k] = numerics::exp2(d * numerics::kLog2e);
        ee[k] = pp[k] * d;
      }
      p[pair % 4] += pp[0] + pp[1];
      e[pair % 4] += ee[0] + ee[1];
    }
    const float sum = (p[0] + p[1]) + (p[2] + p[3]), weighted = (e[0] + e[1]) + (e[2] + e[3]);
    const float d = std::max(m - max, -128.0f), w = numerics::exp2(d * numerics::kLog2e);
    total[b % 32] = numerics::fma(sum, w, total[b % 32]);
    entropy[b % 32] = numerics::fma(numerics::fma(sum, d, weighted), w, entropy[b % 32]);
  }
  RowStats out = cut;
  out.total = numerics::butterfly_sum(total);
  out.max = max;
  out.entropy = numerics::log(out.total) - numerics::butterfly_sum(entropy) / out.total;
  out.logprob = (z(target) - max) - numerics::log(out.total);
  return out;
}

std::int32_t written_draw(const float* logits, std::int64_t V, const RowSampling& s,
                          const RowStats& cut) {
  float best = -kInf;
  std::int32_t token = -1;
  for (std::int64_t v = 0; v < V; ++v) {
    const float z = scaled(logits[v], s);
    if (!is_kept(cut, z, v)) continue;
    const auto counter = (static_cast<std::uint64_t>(s.position) << 32) + v / 4;
    const auto words = base::philox4x32(s.seed, s.stream, counter);
    const float u = (static_cast<float>(words.word[v % 4] >> 9) + 0.5f) * 0x1p-23f;
    const float score = s.temperature == 0 ? z : z - numerics::log(-numerics::log(u));
    if (score > best) {
      best = score;
      token = static_cast<std::int32_t>(v);
    }
  }
  return token;
}

TEST(Vocab, StatsAndDrawsHaveTheWrittenBits) {
  tensor::Arena arena;
  for (const std::int64_t V : {1, 5, 127, 257, 1031, 5003}) {
    const std::int64_t R = 27;
    const Tensor logits = make_logits(R, V, 70 + V);
    const auto all = mixed_rows(R);
    const Result got = run(tensor::cpu_context(arena, 1), logits, all, 0, R);
    for (std::int64_t r = 0; r < R; ++r) {
      const float* x = logits.as<float>() + r * V;
      const std::int32_t token = got.tokens.as<std::int32_t>()[r];
      EXPECT_EQ(token, written_draw(x, V, all[r], got.stats[r])) << "V " << V << " row " << r;
      const RowStats expected = written_stats(x, V, all[r], got.stats[r], token);
      EXPECT_EQ(expected.total, got.stats[r].total);
      EXPECT_EQ(expected.max, got.stats[r].max);
      EXPECT_EQ(expected.entropy, got.stats[r].entropy);
      EXPECT_EQ(expected.logprob, got.stats[r].logprob);
      const float g = static_cast<float>(get_value(got.g, r)), inv_t = scaled(1.0f, all[r]);
      for (std::int64_t v = 0; v < V; ++v) {
        const float z = scaled(x[v], all[r]);
        const float p = numerics::exp2((z - expected.max) * numerics::kLog2e) / expected.total;
        const float d = (((v == token ? 1.0f : 0.0f) - p) * g) * inv_t;
        const int bits = is_kept(got.stats[r], z, v) ? numerics::to_bf16(d).bits : 0;
        EXPECT_EQ(got.d_logits.as<numerics::Bf16>()[r * V + v].bits, bits) << v;
      }
    }
  }
}

// One row of the given logits.
struct One {
  std::int32_t token = -1;
  RowStats stats;
};
One sample_one(const std::vector<float>& x, const RowSampling& s) {
  static tensor::Arena arena;
  const std::int64_t V = static_cast<std::int64_t>(x.size());
  const Tensor logits = empty(DType::kFp32, {1, V});
  std::copy(x.begin(), x.end(), logits.as<float>());
  const Poisoned token(DType::kInt32, {1});
  One out;
  vocab_sample(tensor::cpu_context(arena, 1), logits, &s, token, &out.stats);
  EXPECT_TRUE(token.guards_intact());
  out.token = token.view().as<std::int32_t>()[0];
  return out;
}

std::vector<int> kept_of(const std::vector<float>& x, const RowSampling& s) {
  const One one = sample_one(x, s);
  std::vector<int> out;
  for (std::size_t v = 0; v < x.size(); ++v)
    if (is_kept(one.stats, scaled(x[v], s), static_cast<std::int64_t>(v)))
      out.push_back(static_cast<int>(v));
  return out;
}

TEST(Vocab, TiesGoToTheLowerIndex) {
  EXPECT_EQ(kept_of({1, 3, 3, 3, 0}, settings(1, 2)), (std::vector<int>{1, 2}));
  EXPECT_EQ(kept_of({1, 3, 3, 3, 4}, settings(1, 2)), (std::vector<int>{1, 4}));
  EXPECT_EQ(kept_of({0.0f, -0.0f, 0.0f, -0.0f}, settings(1, 3)), (std::vector<int>{0, 1, 2}));
  EXPECT_EQ(kept_of({-0.0f, 0.0f, 0.0f}, settings(1, 1)), (std::vector<int>{0}));
  EXPECT_EQ(kept_of({2, 2, 2, 2}, settings(1, -1, 0.5f)), (std::vector<int>{0, 1}));
  EXPECT_EQ(kept_of({2, 2, 2, 2}, settings(1, -1, 0.51f)), (std::vector<int>{0, 1, 2}));
  EXPECT_EQ(kept_of({-1, 2, 2, -1}, settings(1, -1, 1, 1.0f)), (std::vector<int>{1, 2}));
  EXPECT_EQ(kept_of({-1, 2, 2, -1}, settings(1, -1, 0)), (std::vector<int>{1}));
  // Top-p counts what top-k left: 0.6 of two equal tokens needs both.
  EXPECT_EQ(kept_of({5, 5, 5, 5, 5}, settings(1, 2, 0.6f)), (std::vector<int>{0, 1}));
  EXPECT_EQ(sample_one({1, 7, 7, 3}, settings(0)).token, 1);
  EXPECT_EQ(sample_one({-0.0f, 0.0f}, settings(0)).token, 0);
}

TEST(Vocab, GreedyIgnoresFilters) {
  const One plain = sample_one({1, 2, 5, 3}, settings(0));
  const One filtered = sample_one({1, 2, 5, 3}, settings(0, 1, 0.1f, 0.9f));
  EXPECT_EQ(plain.token, 2);
  EXPECT_EQ(std::memcmp(&plain.stats, &filtered.stats, sizeof(RowStats)), 0);
  EXPECT_LT(plain.stats.logprob, 0);
}

TEST(Vocab, NonFiniteLogits) {
  for (const RowSampling& s : {settings(1), settings(0), settings(0.5f, 2, 0.9f, 0.1f)}) {
    for (std::uint32_t position = 0; position < 20; ++position) {
      RowSampling at = s;
      at.position = position;
      const One one = sample_one({-kInf, 1, -kInf, 2}, at);
      EXPECT_TRUE(one.token == 1 || one.token == 3);
      EXPECT_TRUE(std::isfinite(one.stats.logprob) && std::isfinite(one.stats.entropy));
    }
    const auto broken = [&](const std::vector<float>& x, std::int32_t token) {
      const One one = sample_one(x, s);
      EXPECT_EQ(one.token, token);
      EXPECT_TRUE(std::isnan(one.stats.logprob) && std::isnan(one.stats.entropy));
    };
    broken({kNan, kNan, 1, 2}, 2);
    broken({1, 2, kNan}, 0);
    broken({kNan, kNan}, 0);
    broken({-kInf, -kInf, -kInf}, 0);
    broken({1, kInf, 2}, 0);
    std::vector<float> wide(300, -kInf);  // whole blocks without a token
    wide[290] = 1.0f;
    EXPECT_EQ(sample_one(wide, s).token, 290);
    EXPECT_EQ(sample_one(wide, s).stats.logprob, 0.0f);
    EXPECT_EQ(sample_one(wide, s).stats.entropy, 0.0f);
    const One far = sample_one({3e38f, -3e38f}, settings(1));  // the difference overflows
    EXPECT_EQ(far.token, 0);
    EXPECT_EQ(far.stats.entropy, 0.0f);
  }
}

TEST(Vocab, BackwardOfSpecialRows) {
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const Tensor logits = empty(DType::kFp32, {4, 3}), targets = empty(DType::kInt32, {4}),
               g = empty(DType::kFp32, {4});
  const float x[12] = {1, 2, 3, 1, 2, 3, 1, kNan, 3, 1, kNan, 3};
  std::copy_n(x, 12, logits.as<float>());
  const float gs[4] = {0, 1, 1, 0};
  std::copy_n(gs, 4, g.as<float>());
  const std::vector<RowSampling> all(4, settings(1, 1));  // row 1: target 0 is not kept
  std::vector<RowStats> stats(4);
  vocab_logprobs(ctx, logits, targets, all.data(), stats.data());
  EXPECT_EQ(stats[1].logprob, -kInf);
  const Poisoned d(DType::kBf16, {4, 3});
  vocab_backward(ctx, logits, targets, all.data(), stats.data(), g, d);
  EXPECT_TRUE(d.guards_intact());
  for (int i = 0; i < 12; ++i) {
    if (i / 3 == 2)
      EXPECT_TRUE(std::isnan(get_value(d, i)));
    else
      EXPECT_EQ(d.view().as<numerics::Bf16>()[i].bits, 0) << i;
  }
}

// Noise is finite for every word that the generator can give.
TEST(Vocab, UniformIsInsideTheOpenInterval) {
  for (const std::uint32_t word : {0u, 511u, 512u, 0x7FFFFFFFu, 0xFFFFFE00u, 0xFFFFFFFFu}) {
    const float u = (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f;
    EXPECT_TRUE(u > 0 && u < 1) << word;
    EXPECT_TRUE(std::isfinite(numerics::log(-numerics::log(u)))) << word;
  }
}

// Counts of `draws` tokens from one row, one position each.
std::vector<int> draw_counts(const Context& ctx, const std::vector<float>& x, const RowSampling& s,
                             std::int64_t draws) {
  const std::int64_t V = static_cast<std::int64_t>(x.size()), R = 500;
  const Tensor logits = empty(DType::kFp32, {R, V}), tokens = empty(DType::kInt32, {R});
  for (std::int64_t r = 0; r < R; ++r) std::copy(x.begin(), x.end(), logits.as<float>() + r * V);
  std::vector<int> counts(x.size());
  std::vector<RowStats> stats(R);
  for (std::int64_t begin = 0; begin < draws; begin += R) {
    std::vector<RowSampling> all(R, s);
    for (std::int64_t r = 0; r < R; ++r) all[r].position = static_cast<std::uint32_t>(begin + r);
    vocab_sample(ctx, logits, all.data(), tokens, stats.data());
    for (std::int64_t r = 0; r < R; ++r) ++counts[tokens.as<std::int32_t>()[r]];
  }
  return counts;
}

// Chi-square against the reference's probabilities, tokens with fewer than 10 expected draws
// together. The bound is the mean of the statistic and five of its standard deviations.
TEST(Vocab, DrawsFollowTheDistribution) {
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const std::int64_t draws = 20000;
  for (const std::int64_t V : {11, 200})
    for (RowSampling s : {settings(1), settings(0.8f), settings(1.2f, 7), settings(1, -1, 0.8f),
                          settings(1, -1, 1, 0.1f)}) {
      if (V > 128 && s.top_p < 1) continue;
      s.seed = 1234567;
      s.stream = 42;
      const Tensor logits = make_logits(1, V, 90 + V);
      const std::vector<float> x(logits.as<float>(), logits.as<float>() + V);
      const auto counts = draw_counts(ctx, x, s, draws);
      const auto d = reference::vocab(row(logits, 0), s);
      double chi = 0, rest_expected = 0, rest = 0;
      int cells = 0;
      for (std::int64_t v = 0; v < V; ++v) {
        const double e = d.p[v] * static_cast<double>(draws);
        if (e == 0) {
          EXPECT_EQ(counts[v], 0);
        } else if (e < 10) {
          rest_expected += e;
          rest += counts[v];
        } else {
          chi += (counts[v] - e) * (counts[v] - e) / e;
          ++cells;
        }
      }
      if (rest_expected > 10) {
        chi += (rest - rest_expected) * (rest - rest_expected) / rest_expected;
        ++cells;
      }
      const double freedom = cells - 1;
      EXPECT_LE(chi, freedom + 5 * std::sqrt(2 * freedom) + 1e-9) << "V " << V;
    }
}

TEST(Vocab, SeedStreamAndPositionChangeTheDraw) {
  const std::vector<float> x(64, 0.0f);
  std::set<std::int32_t> by_seed, by_stream, by_position;
  for (std::uint32_t i = 0; i < 20; ++i) {
    RowSampling s = settings(1);
    s.seed = i;
    by_seed.insert(sample_one(x, s).token);
    s = settings(1);
    s.stream = static_cast<std::uint64_t>(i) << 32;
    by_stream.insert(sample_one(x, s).token);
    s = settings(1);
    s.position = i;
    by_position.insert(sample_one(x, s).token);
  }
  EXPECT_GT(by_seed.size(), 5u);
  EXPECT_GT(by_stream.size(), 5u);
  EXPECT_GT(by_position.size(), 5u);
}

TEST(Vocab, RefusesBadArguments) {
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  RowStats stats;
  const auto with = [&](const RowSampling& s, std::int32_t target, std::int64_t V) {
    vocab_logprobs(ctx, empty(DType::kFp32, {1, V}), int32_tensor({target}), &s, &stats);
  };
  EXPECT_NO_THROW(with(settings(1), 4, 5));
  EXPECT_THROW(with(settings(1), 5, 5), base::ContractError);
  EXPECT_THROW(with(settings(1), -1, 5), base::ContractError);
  EXPECT_THROW(with(settings(1), 0, 0), base::ContractError);
  for (const float t : {-1.0f, kNan, kInf, 1e-40f})
    EXPECT_THROW(with(settings(t), 0, 5), base::ContractError) << t;
  EXPECT_THROW(with(settings(1, -1, kNan), 0, 5), base::ContractError);
  EXPECT_THROW(with(settings(1, -1, 1, kNan), 0, 5), base::ContractError);
  vocab_logprobs(ctx, empty(DType::kFp32, {0, 5}), empty(DType::kInt32, {0}), nullptr, nullptr);
}

}  // namespace
}  // namespace lockstep::ops::test

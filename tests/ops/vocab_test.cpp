// ops/vocab.h: log-probabilities, stats and gradient.
#include "ops/reference/vocab.h"

#include <algorithm>
#include <set>

#include "base/philox.h"
#include "numerics/reduce.h"
#include "ops/vocab_case.h"

namespace lockstep::ops::test {
namespace {

constexpr double kUlp = 0x1p-24;

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

}  // namespace
}  // namespace lockstep::ops::test

// ops/vocab.h: which tokens a row keeps, and how it draws among them.
#include <algorithm>
#include <set>

#include "base/philox.h"
#include "numerics/math.h"
#include "ops/reference/vocab.h"
#include "ops/vocab_case.h"

namespace lockstep::ops::test {
namespace {

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
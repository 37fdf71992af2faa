// ops/router.h: selection, weights, gradients. E experts, C chosen, T tokens.
#include "ops/router.h"

#include <algorithm>
#include <set>

#include "numerics/reduce.h"
#include "ops/op_test_util.h"
#include "ops/reference/router.h"

namespace lockstep::ops::test {
namespace {

constexpr double kUlp = 0x1p-24;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

struct Case {
  std::int64_t T, E;
  RouterOptions options;
  bool bias;
};

std::vector<Case> cases() {
  const auto soft = RouterScore::kSoftmax, sigm = RouterScore::kSigmoid;
  return {
      {0, 8, {soft, 2, 1, 1, true, 1.0f}, false},   {1, 1, {soft, 1, 1, 1, true, 1.0f}, false},
      {5, 7, {soft, 7, 1, 1, true, 1.0f}, true},    {64, 8, {soft, 2, 1, 1, false, 1.0f}, false},
      {33, 33, {soft, 3, 1, 1, true, 2.5f}, false}, {130, 128, {soft, 8, 1, 1, true, 1.0f}, true},
      {7, 257, {soft, 8, 1, 1, false, 0.7f}, true}, {20, 64, {soft, 6, 8, 3, false, 16.0f}, false},
      {1, 5, {sigm, 1, 1, 1, true, 1.0f}, false},   {40, 256, {sigm, 8, 8, 4, true, 2.5f}, true},
      {9, 31, {sigm, 4, 1, 1, false, 1.0f}, false}, {13, 16, {sigm, 3, 16, 5, true, 1.5f}, true},
  };
}

struct Data {
  Tensor logits, bias, d_weights, d_score;
};

Data make_data(const Case& c, std::uint64_t seed) {
  Rng rng(seed);
  Data d;
  d.logits = random_normal(rng, DType::kFp32, {c.T, c.E}, 2.0);
  if (c.bias) d.bias = random_normal(rng, DType::kFp32, {c.E}, 0.1);
  d.d_weights = random_normal(rng, DType::kFp32, {c.T, c.options.top_k});
  d.d_score = random_normal(rng, DType::kFp32, {c.E});
  return d;
}

TensorView view_or_empty(const Tensor& t) { return t ? t.view() : TensorView{}; }

std::vector<double> row(const TensorView& x, std::int64_t t) { return values(x.rows(t, 1)); }

std::vector<int> int_row(const TensorView& x, std::int64_t t) {
  std::vector<int> out;
  for (const double v : row(x, t)) out.push_back(static_cast<int>(v));
  return out;
}

// Relative error bound of a score: two exponentials, each with the function's error and that of its
// argument, the sum in 32 lanes and the division.
double score_error(const std::vector<double>& z) {
  const auto [low, high] = std::minmax_element(z.begin(), z.end());
  const double range = std::max({*high - *low, std::abs(*high), std::abs(*low)});
  return 2 * (0x1p-22 + range * kUlp) + (static_cast<double>(z.size()) / 32 + 8) * kUlp;
}

TEST(Router, AgainstReference) {
  tensor::Arena arena;
  std::uint64_t seed = 1;
  for (const Case& c : cases()) {
    const Data d = make_data(c, ++seed);
    const Poisoned weights(DType::kFp32, {c.T, c.options.top_k});
    const Poisoned experts(DType::kInt32, {c.T, c.options.top_k});
    router(context(arena, Isa::kPortable), d.logits, view_or_empty(d.bias), c.options, weights,
           experts);
    EXPECT_TRUE(weights.guards_intact() && experts.guards_intact());
    for (std::int64_t t = 0; t < c.T; ++t) {
      const auto z = row(d.logits, t);
      const auto expected =
          reference::router(z, c.bias ? values(d.bias) : std::vector<double>{}, c.options);
      EXPECT_EQ(int_row(experts, t), expected.experts) << "E " << c.E << " token " << t;
      const auto w = row(weights, t);
      const double bound = 2 * score_error(z) + (c.options.top_k + 4) * kUlp;
      for (std::size_t k = 0; k < w.size(); ++k)
        EXPECT_LE(std::abs(w[k] - expected.weights[k]), bound * expected.weights[k]);
    }
  }
}

TEST(Router, BackwardAgainstReference) {
  tensor::Arena arena;
  std::uint64_t seed = 100;
  for (const Case& c : cases())
    for (const bool balance : {false, true}) {
      const Data d = make_data(c, ++seed);
      const Tensor weights = empty(DType::kFp32, {c.T, c.options.top_k});
      const Tensor experts = empty(DType::kInt32, {c.T, c.options.top_k});
      const Poisoned d_logits(DType::kFp32, {c.T, c.E});
      const Context ctx = context(arena, Isa::kPortable);
      router(ctx, d.logits, view_or_empty(d.bias), c.options, weights, experts);
      router_backward(ctx, d.logits, experts, d.d_weights,
                      balance ? d.d_score.view() : TensorView{}, c.options, d_logits);
      EXPECT_TRUE(d_logits.guards_intact());
      const auto d_score = balance ? values(d.d_score) : std::vector<double>{};
      for (std::int64_t t = 0; t < c.T; ++t) {
        const auto z = row(d.logits, t), g = row(d.d_weights, t), got = row(d_logits, t);
        const auto chosen = int_row(experts, t);
        const auto expected = reference::router_backward(z, chosen, g, d_score, c.options);
        const auto routed = reference::router(z, {}, c.options);
        // Largest magnitude that enters a score gradient.
        double divisor = 0, all = 0, size = 0;
        for (const int e : chosen) divisor += routed.scores[e];
        for (const double s : routed.scores) all += s;
        for (const double x : g)
          size += 2 * std::abs(x * static_cast<double>(c.options.scaling)) /
                  (c.options.normalize ? divisor : 1.0);
        for (const double x : d_score) size = std::max(size, size + 2 * std::abs(x) / all);
        const double relative =
            12 * score_error(z) + 2 * (c.options.top_k + static_cast<double>(c.E) / 32 + 20) * kUlp;
        for (std::size_t e = 0; e < z.size(); ++e)
          EXPECT_LE(std::abs(got[e] - expected[e]), routed.scores[e] * size * relative)
              << "E " << c.E << " token " << t << " expert " << e;
      }
    }
}

// Loss = <d_weights, weights> + <d_balance, balance scores> of one token, by central differences.
TEST(Router, ReferenceBackwardAgainstDifferences) {
  std::uint64_t seed = 200;
  for (const Case& c : cases()) {
    if (c.T == 0) continue;
    const Data d = make_data(c, ++seed);
    const auto g = row(d.d_weights, 0), d_balance = values(d.d_score);
    auto z = row(d.logits, 0);
    const auto chosen =
        reference::router(z, c.bias ? values(d.bias) : std::vector<double>{}, c.options).experts;
    const auto loss = [&] {
      const auto r = reference::router(z, {}, c.options);
      const auto w = reference::router_weights(r.scores, chosen, c.options);
      double sum = 0;
      for (std::size_t k = 0; k < w.size(); ++k) sum += g[k] * w[k];
      for (std::size_t e = 0; e < z.size(); ++e) sum += d_balance[e] * r.balance[e];
      return sum;
    };
    const auto dz = reference::router_backward(z, chosen, g, d_balance, c.options);
    for (std::size_t e = 0; e < z.size(); ++e) {
      const double keep = z[e], h = 1e-4;
      z[e] = keep + h;
      const double up = loss();
      z[e] = keep - h;
      const double down = loss();
      z[e] = keep;
      EXPECT_LE(std::abs((up - down) / (2 * h) - dz[e]), 1e-6) << "E " << c.E << " expert " << e;
    }
  }
}

TEST(Router, SameBytesForIsaThreadsAndNeighbours) {
  tensor::Arena arena;
  std::uint64_t seed = 300;
  for (const Case& c : cases()) {
    const Data d = make_data(c, ++seed);
    const auto run = [&](Isa isa, int threads, std::int64_t begin, std::int64_t count) {
      const Context ctx = context(arena, isa, threads);
      const std::int64_t C = c.options.top_k;
      std::vector<Tensor> out = {empty(DType::kFp32, {count, C}), empty(DType::kInt32, {count, C}),
                                 empty(DType::kFp32, {count, c.E}), empty(DType::kFp64, {c.E})};
      const TensorView z = d.logits.view().rows(begin, count);
      router(ctx, z, view_or_empty(d.bias), c.options, out[0], out[1]);
      router_backward(ctx, z, out[1], d.d_weights.view().rows(begin, count), d.d_score, c.options,
                      out[2]);
      router_mean_scores(ctx, z, c.options, out[3]);
      return out;
    };
    const auto base = run(Isa::kPortable, 1, 0, c.T);
    for (const Isa isa : supported_isas())
      for (const int threads : {1, 2}) {
        const auto other = run(isa, threads, 0, c.T);
        for (int i = 0; i < 4; ++i)
          EXPECT_TRUE(bytes_equal(base[i], other[i])) << tensor::isa_name(isa) << " " << i;
      }
    for (const std::int64_t t : {std::int64_t{0}, c.T / 2, c.T - 1}) {
      if (c.T == 0) break;
      const auto alone = run(tensor::best_isa(), 1, t, 1);
      for (int i = 0; i < 3; ++i)
        EXPECT_TRUE(bytes_equal(base[i].view().rows(t, 1), alone[i])) << "token " << t;
    }
  }
}

// The written order of operations, as a plain loop.
TEST(Router, WeightsHaveTheWrittenBits) {
  tensor::Arena arena;
  std::uint64_t seed = 400;
  for (const Case& c : cases()) {
    const Data d = make_data(c, ++seed);
    const Tensor weights = empty(DType::kFp32, {c.T, c.options.top_k});
    const Tensor experts = empty(DType::kInt32, {c.T, c.options.top_k});
    router(tensor::cpu_context(arena, 1), d.logits, view_or_empty(d.bias), c.options, weights,
           experts);
    for (std::int64_t t = 0; t < c.T; ++t) {
      const float* z = d.logits.as<float>() + t * c.E;
      std::vector<float> s(c.E);
      float max = z[0];
      for (std::int64_t e = 0; e < c.E; ++e) max = std::max(max, z[e]);
      const bool softmax = c.options.score == RouterScore::kSoftmax;
      for (std::int64_t e = 0; e < c.E; ++e)
        s[e] = softmax ? numerics::exp(z[e] - max) : numerics::sigmoid(z[e]);
      const float sum =
          numerics::strided_sum<float>(c.E, [&](std::int64_t e, float acc) { return acc + s[e]; });
      float chosen = 0;
      for (int k = 0; k < c.options.top_k; ++k) {
        float& x = s[experts.as<std::int32_t>()[t * c.options.top_k + k]];
        if (softmax) x = x / sum;
        chosen = chosen + x;
      }
      for (int k = 0; k < c.options.top_k; ++k) {
        float w = s[experts.as<std::int32_t>()[t * c.options.top_k + k]];
        if (c.options.normalize) w = w / (chosen + (softmax ? 0.0f : 1e-20f));
        w = w * c.options.scaling;
        EXPECT_EQ(w, weights.as<float>()[t * c.options.top_k + k]);
      }
    }
  }
}

std::vector<int> choose(const std::vector<float>& logits, const std::vector<float>& bias,
                        const RouterOptions& options) {
  tensor::Arena arena;
  const std::int64_t E = static_cast<std::int64_t>(logits.size());
  const Tensor z = empty(DType::kFp32, {1, E}), weights = empty(DType::kFp32, {1, options.top_k}),
               experts = empty(DType::kInt32, {1, options.top_k});
  std::copy(logits.begin(), logits.end(), z.as<float>());
  Tensor b;
  if (!bias.empty()) {
    b = empty(DType::kFp32, {E});
    std::copy(bias.begin(), bias.end(), b.as<float>());
  }
  router(tensor::cpu_context(arena, 1), z, view_or_empty(b), options, weights, experts);
  return int_row(experts, 0);
}

TEST(Router, TiesGoToTheLowerIndex) {
  RouterOptions options{RouterScore::kSoftmax, 2, 1, 1, true, 1.0f};
  EXPECT_EQ(choose({1, 0, 1, 1, 2, 1}, {}, options), (std::vector<int>{4, 0}));
  EXPECT_EQ(choose({0, 0, 0, 0}, {}, options), (std::vector<int>{0, 1}));
  EXPECT_EQ(choose({-kInf, 0, -kInf, -kInf}, {}, options), (std::vector<int>{1, 0}));
  // Groups of two with equal values: the first group wins; within it the lower index.
  options = {RouterScore::kSigmoid, 2, 3, 1, true, 1.0f};
  EXPECT_EQ(choose({0, 1, 1, 0, 1, 0}, {}, options), (std::vector<int>{1, 0}));
  EXPECT_EQ(choose({0, 1, 2, 2, 2, 2}, {}, options), (std::vector<int>{2, 3}));
}

TEST(Router, BiasChoosesButDoesNotWeigh) {
  const RouterOptions options{RouterScore::kSigmoid, 1, 1, 1, false, 1.0f};
  tensor::Arena arena;
  const Tensor z = empty(DType::kFp32, {1, 4}), bias = empty(DType::kFp32, {4});
  bias.as<float>()[3] = 1.0f;
  const Poisoned w(DType::kFp32, {1, 1}), e(DType::kInt32, {1, 1});
  router(tensor::cpu_context(arena, 1), z, bias, options, w, e);
  EXPECT_EQ(get_value(e, 0), 3);
  EXPECT_EQ(get_value(w, 0), 0.5);
}

// The group of the single best expert loses against a group of two good ones.
TEST(Router, GroupValueIsTheSumOfItsTwoBest) {
  RouterOptions options{RouterScore::kSigmoid, 2, 2, 1, true, 1.0f};
  EXPECT_EQ(choose({4, -9, -9, 1, 2, -9}, {}, options), (std::vector<int>{4, 3}));
  options.groups = 6;  // groups of one
  options.top_groups = 2;
  EXPECT_EQ(choose({4, -9, -9, 1, 2, -9}, {}, options), (std::vector<int>{0, 4}));
}

TEST(Router, NotANumberSortsLast) {
  const RouterOptions sigmoid{RouterScore::kSigmoid, 3, 1, 1, true, 1.0f};
  EXPECT_EQ(choose({kNan, -5, kNan, 1}, {}, sigmoid), (std::vector<int>{3, 1, 0}));
  for (const RouterScore score : {RouterScore::kSoftmax, RouterScore::kSigmoid})
    for (const float x : {kNan, kInf, -kInf}) {
      const auto e = choose({x, x, x, x}, {}, {score, 4, 2, 2, true, 1.0f});
      EXPECT_EQ(std::set<int>(e.begin(), e.end()).size(), 4u);
    }
}

TEST(Router, MeanScores) {
  tensor::Arena arena;
  for (const Case& c : cases()) {
    const Data d = make_data(c, 500);
    const Poisoned sum(DType::kFp64, {c.E});
    router_mean_scores(tensor::cpu_context(arena, 2), d.logits, c.options, sum);
    EXPECT_TRUE(sum.guards_intact());
    std::vector<double> expected(c.E, 0.0), bound(c.E, 0.0);
    for (std::int64_t t = 0; t < c.T; ++t) {
      const auto z = row(d.logits, t);
      const auto q = reference::router(z, {}, c.options).balance;
      for (std::int64_t e = 0; e < c.E; ++e)
        expected[e] += q[e], bound[e] += q[e] * 2 * score_error(z);
    }
    for (std::int64_t e = 0; e < c.E; ++e)
      EXPECT_LE(std::abs(get_value(sum, e) - expected[e]), bound[e]);
  }
}

TEST(Router, BalanceGradientHasTheWrittenBits) {
  tensor::Arena arena;
  Rng rng(31);
  constexpr std::int64_t E = 5, T = 37, C = 3;
  const Tensor offsets = int32_tensor({0, 11, 11, 40, 97, 111}), sum = empty(DType::kFp64, {E}),
               value = empty(DType::kFp64, {1});
  for (std::int64_t e = 0; e < E; ++e) set_value(sum, e, uniform(rng, 0, T));
  for (const Isa isa : supported_isas()) {
    const Poisoned d_score(DType::kFp32, {E});
    set_value(value, 0, 0.25);
    balance_gradient(context(arena, isa), offsets, sum, {1e-2, 0.3, T, C}, d_score, value);
    double expected = 0.25;
    for (std::int64_t e = 0; e < E; ++e) {
      const double rows = offsets.as<std::int32_t>()[e + 1] - offsets.as<std::int32_t>()[e];
      const double slope = 1e-2 * 0.3 * 5.0 * rows / (3.0 * 37.0 * 37.0);
      expected = expected + slope * sum.as<double>()[e];
      EXPECT_EQ(d_score.view().as<float>()[e], static_cast<float>(slope));
    }
    EXPECT_EQ(value.as<double>()[0], expected);
    EXPECT_TRUE(d_score.guards_intact());
  }
}

TEST(Router, RefusesBadArguments) {
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const Tensor z = empty(DType::kFp32, {2, 8}), w = empty(DType::kFp32, {2, 2}),
               e = empty(DType::kInt32, {2, 2}), dz = empty(DType::kFp32, {2, 8});
  const auto with = [&](int top_k, int groups, int top_groups) {
    router(ctx, z, {}, {RouterScore::kSoftmax, top_k, groups, top_groups, true, 1.0f}, w, e);
  };
  EXPECT_NO_THROW(with(2, 4, 1));
  EXPECT_THROW(with(2, 3, 1), base::ContractError);
  EXPECT_THROW(with(2, 8, 1), base::ContractError);
  EXPECT_THROW(with(2, 4, 5), base::ContractError);
  EXPECT_THROW(with(3, 4, 1), base::ContractError);
  EXPECT_THROW(with(0, 1, 1), base::ContractError);
  const RouterOptions options{RouterScore::kSoftmax, 2, 1, 1, true, 1.0f};
  for (const int bad : {-1, 8}) {
    e.as<std::int32_t>()[3] = bad;
    EXPECT_THROW(router_backward(ctx, z, e, w, {}, options, dz), base::ContractError);
  }
}

}  // namespace
}  // namespace lockstep::ops::test

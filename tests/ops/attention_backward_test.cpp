#include <gtest/gtest.h>

#include "ops/attention_bounds.h"
#include "ops/attention_case.h"

namespace lockstep::ops::test {
namespace {

struct Gradients {
  explicit Gradients(const AttentionCase& x)
      : d_q(DType::kBf16, x.q_THK.view().shape),
        d_k(DType::kBf16, x.k_TJK.view().shape),
        d_v(DType::kBf16, x.v_TJK.view().shape) {}
  Poisoned d_q, d_k, d_v;
};

Gradients backward(const Context& ctx, const AttentionCase& x, const TensorView& d_out) {
  const AttentionResult f = forward(ctx, x);
  Gradients r(x);
  if (x.sizes.latent)  // nobody writes d_v
    std::memset(r.d_v.view().data, 0, r.d_v.view().bytes());
  attention_backward(ctx, x.q_THK, x.k_TJK, x.v(), f.out_THK, f.lse2_TH, d_out, x.batch(),
                     x.sizes.scale, r.d_q, r.d_k, x.sizes.latent ? TensorView{} : r.d_v.view());
  for (const Poisoned* p : {&r.d_q, &r.d_k, &r.d_v})
    EXPECT_TRUE(p->guards_intact() && p->all_written());
  return r;
}

Tensor output_gradient(Rng& rng, const AttentionCase& x) {
  return random_normal(rng, DType::kBf16, {x.T(), x.sizes.H, x.sizes.Kv});
}

::testing::AssertionResult same(const Gradients& a, const Gradients& b) {
  for (const auto member : {&Gradients::d_q, &Gradients::d_k, &Gradients::d_v}) {
    const auto equal = bytes_equal(a.*member, b.*member);
    if (!equal) return equal;
  }
  return ::testing::AssertionSuccess();
}

TEST(AttentionBackward, HasTheBitsOfTheContract) {
  Rng rng(1);
  tensor::Arena arena;
  const Context ctx = context(arena, tensor::best_isa());
  const AttentionSizes grouped{4, 2, 16, 16, 0.25}, odd{3, 1, 20, 7, 0.2},
      latent{4, 2, 32, 21, 0.2, true};
  for (const auto& [n, lengths, deviation] :
       {std::tuple{grouped, std::vector<std::int64_t>{1, 2, 16, 31, 129}, 1.0},
        std::tuple{odd, std::vector<std::int64_t>{33, 150}, 1.0},
        std::tuple{latent, std::vector<std::int64_t>{1, 2, 16, 31, 129}, 1.0},
        std::tuple{odd, std::vector<std::int64_t>{64}, 40.0}}) {
    const AttentionCase x = attention_case(rng, n, lengths, deviation);
    const Tensor d_out = output_gradient(rng, x);
    const AttentionResult f = forward(ctx, x);
    const Gradients got = backward(ctx, x, d_out);
    const Gradients expected(x);
    for (std::size_t s = 0; s < lengths.size(); ++s) {
      const auto row = [&](const TensorView& t) { return t.rows(x.begin(s), x.lengths[s]); };
      contract_backward(contract_sequence(x, s), row(f.out_THK).as<Bf16>(),
                        row(f.lse2_TH).as<float>(), row(d_out).as<Bf16>(),
                        row(expected.d_q).as<Bf16>(), row(expected.d_k).as<Bf16>(),
                        n.latent ? nullptr : row(expected.d_v).as<Bf16>());
    }
    if (n.latent) std::memset(expected.d_v.view().data, 0, expected.d_v.view().bytes());
    EXPECT_TRUE(same(expected, got));
  }
}

TEST(AttentionBackward, AgreesWithTheReference) {
  Rng rng(2);
  tensor::Arena arena;
  for (const double deviation : {0.1, 1.0, 5.0}) {
    const AttentionCase x =
        attention_case(rng, {4, 2, 32, 16, 0.2, deviation > 1}, {1, 2, 17, 127, 130}, deviation);
    const Tensor d_out = output_gradient(rng, x);
    const Gradients got = backward(context(arena, tensor::best_isa()), x, d_out);
    for (std::size_t s = 0; s < x.lengths.size(); ++s) {
      ReferenceBackward r = reference_backward(x, d_out, s);
      const AttentionSizes& n = x.sizes;
      for (std::size_t i = 0; n.latent && i < r.d_v.size(); ++i) {
        const auto width = static_cast<std::size_t>(n.Kv);
        const std::size_t at = i / width * static_cast<std::size_t>(n.K) + i % width;
        r.d_k[at] += r.d_v[i];  // both bounds hold a rounding; the sum has one
        r.d_k_bound[at] += r.d_v_bound[i] + kBf16Unit * std::abs(r.d_k[at]);
      }
      const auto check = [&](const TensorView& packed, const std::vector<double>& exact,
                             const std::vector<double>& bound, const char* name) {
        const auto v = sequence_values(x, packed, s);
        for (std::size_t i = 0; i < v.size(); ++i)
          ASSERT_LE(std::abs(v[i] - exact[i]), bound[i])
              << name << ' ' << i << " length " << x.lengths[s];
      };
      check(got.d_q, r.d_q, r.d_q_bound, "d_q");
      check(got.d_k, r.d_k, r.d_k_bound, "d_k");
      if (!n.latent) check(got.d_v, r.d_v, r.d_v_bound, "d_v");
    }
  }
}

// Central differences in double: the error of a step e is near e^2 times the third derivative, and
// of rounding 1e-16 / e.
TEST(AttentionBackward, ReferenceAgreesWithCentralDifferences) {
  Rng rng(3);
  for (const auto& [queries, keys] : {std::pair{5, 5}, std::pair{2, 6}, std::pair{1, 1}}) {
    const reference::AttentionShape n{queries, keys, 4, 2, 3, 5, 0.7};
    const auto random = [&](std::int64_t count) {
      std::vector<double> v(static_cast<std::size_t>(count));
      for (double& e : v) e = static_cast<double>(normal(rng));
      return v;
    };
    auto q = random(n.queries * 4 * 3), k = random(n.keys * 2 * 3), v = random(n.keys * 2 * 5);
    const auto g = random(n.queries * 4 * 5);
    std::vector<double> out(g.size()), d_q(q.size()), d_k(k.size()), d_v(v.size());
    const auto loss = [&] {
      reference::attention(n, q.data(), k.data(), v.data(), out.data(), nullptr);
      double sum = 0;
      for (std::size_t i = 0; i < g.size(); ++i) sum += g[i] * out[i];
      return sum;
    };
    reference::attention_backward(n, q.data(), k.data(), v.data(), g.data(), d_q.data(), d_k.data(),
                                  d_v.data());
    const auto check = [&](std::vector<double>& x, const std::vector<double>& d_x) {
      for (std::size_t i = 0; i < x.size(); ++i) {
        const double at = x[i], e = 1e-5;
        x[i] = at + e;
        const double up = loss();
        x[i] = at - e;
        const double down = loss();
        x[i] = at;
        EXPECT_LE(std::abs((up - down) / (2 * e) - d_x[i]), 1e-8);
      }
    };
    check(q, d_q);
    check(k, d_k);
    check(v, d_v);
  }
}

TEST(AttentionBackward, BitsDoNotDependOnThreadsInstructionSetOrNeighbours) {
  Rng rng(4);
  tensor::Arena arena;
  for (const AttentionSizes& n :
       {AttentionSizes{6, 3, 24, 40, 0.2}, AttentionSizes{6, 3, 24, 17, 0.2, true}}) {
    const AttentionCase x = attention_case(rng, n, {3, 0, 64, 131, 17});
    const Tensor d_out = output_gradient(rng, x);
    const Gradients first = backward(context(arena, Isa::kPortable), x, d_out);
    for (const Isa isa : supported_isas())
      for (const int threads : {1, 2, 3})
        EXPECT_TRUE(same(first, backward(context(arena, isa, threads), x, d_out)))
            << tensor::isa_name(isa) << ' ' << threads;
    const Context ctx = context(arena, tensor::best_isa());
    for (std::size_t s = 0; s < x.lengths.size(); ++s) {
      const auto rows = [&](const TensorView& t) { return t.rows(x.begin(s), x.lengths[s]); };
      const Gradients alone = backward(ctx, only(x, s), rows(d_out));
      EXPECT_TRUE(bytes_equal(alone.d_q, rows(first.d_q)));
      EXPECT_TRUE(bytes_equal(alone.d_k, rows(first.d_k)));
      EXPECT_TRUE(bytes_equal(alone.d_v, rows(first.d_v)));
    }
  }
}

TEST(AttentionBackward, TakesEmptyBatches) {
  Rng rng(5);
  tensor::Arena arena;
  const Context ctx = context(arena, tensor::best_isa());
  for (const auto& lengths : {std::vector<std::int64_t>{}, std::vector<std::int64_t>{0, 0}}) {
    const AttentionCase x = attention_case(rng, {}, lengths);
    backward(ctx, x, output_gradient(rng, x));
  }
}

TEST(AttentionBackward, RefusesPagesChunksAndMissingLse) {
  Rng rng(6);
  tensor::Arena arena;
  const Context ctx = context(arena, tensor::best_isa());
  const AttentionCase x = attention_case(rng, {}, {4, 4});
  const Tensor d_out = output_gradient(rng, x);
  const AttentionResult f = forward(ctx, x);
  Gradients r(x);
  const auto run = [&](const AttentionBatch& batch, const TensorView& lse2) {
    attention_backward(ctx, x.q_THK, x.k_TJK, x.v_TJK, f.out_THK, lse2, d_out, batch, x.sizes.scale,
                       r.d_q, r.d_k, r.d_v);
  };
  const Tensor pages = int32_tensor({0, 1}), offsets = int32_tensor({0, 3, 7});
  EXPECT_NO_THROW(run(x.batch(), f.lse2_TH));
  EXPECT_THROW(attention_backward(ctx, x.q_THK, x.k_TJK, {}, f.out_THK, f.lse2_TH, d_out, x.batch(),
                                  x.sizes.scale, r.d_q, r.d_k, r.d_v),
               base::ContractError);
  EXPECT_THROW(run(x.batch(), {}), base::ContractError);
  EXPECT_THROW(run({x.offsets_S1, x.lengths_S, pages.view().reshape({2, 1}), 4}, f.lse2_TH),
               base::ContractError);
  EXPECT_THROW(run({offsets, x.lengths_S, {}, 0}, f.lse2_TH), base::ContractError);
}

}  // namespace
}  // namespace lockstep::ops::test

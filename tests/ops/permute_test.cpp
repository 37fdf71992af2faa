// ops/permute.h: the sort, the weighted combine and their gradients.
#include "ops/permute.h"

#include "numerics/reduce.h"
#include "ops/op_test_util.h"
#include "ops/reference/permute.h"

namespace lockstep::ops::test {
namespace {

using numerics::Bf16;

constexpr double kUlp = 0x1p-24;
constexpr double kBf16Ulp = 0x1p-8;  // one BF16 rounding, relative to the result
constexpr double kTiny = 0x1p-126;

struct Case {
  std::int64_t T, C, E, D;
};
const std::vector<Case> kCases = {{0, 2, 4, 8},    {1, 1, 1, 1},    {3, 2, 5, 7},   {17, 3, 4, 31},
                                  {65, 8, 16, 64}, {40, 2, 3, 257}, {9, 1, 2, 513}, {2, 4, 4, 0}};

struct Data {
  Tensor experts, h, o, weights, shared, dy, d_x, first, last;
};

Data make_data(const Case& c, std::uint64_t seed) {
  Rng rng(seed);
  Data d;
  d.experts = empty(DType::kInt32, {c.T, c.C});
  // The last expert gets no rows where there are others.
  for (std::int64_t i = 0; i < c.T * c.C; ++i)
    d.experts.as<std::int32_t>()[i] =
        static_cast<std::int32_t>(uniform_int(rng, 0, std::max<std::int64_t>(0, c.E - 2)));
  const Shape TD{c.T, c.D}, MD{c.T * c.C, c.D};
  d.h = random_normal(rng, DType::kBf16, TD);
  d.o = random_normal(rng, DType::kBf16, MD);
  d.weights = random_normal(rng, DType::kFp32, {c.T, c.C});
  d.shared = random_normal(rng, DType::kBf16, TD);
  d.dy = random_normal(rng, DType::kBf16, TD);
  d.d_x = random_normal(rng, DType::kBf16, MD);
  d.first = random_normal(rng, DType::kBf16, TD);
  d.last = random_normal(rng, DType::kBf16, TD);
  return d;
}

struct Outputs {
  Poisoned offsets, padded, row, token, permuted, y, y_shared, d_o, d_weights, d_h, d_h_all;
  explicit Outputs(const Case& c)
      : offsets(DType::kInt32, {c.E + 1}),
        padded(DType::kInt32, {c.E + 1}),
        row(DType::kInt32, {c.T, c.C}),
        token(DType::kInt32, {c.T * c.C}),
        permuted(DType::kBf16, {c.T * c.C, c.D}),
        y(DType::kBf16, {c.T, c.D}),
        y_shared(DType::kBf16, {c.T, c.D}),
        d_o(DType::kBf16, {c.T * c.C, c.D}),
        d_weights(DType::kFp32, {c.T, c.C}),
        d_h(DType::kBf16, {c.T, c.D}),
        d_h_all(DType::kBf16, {c.T, c.D}) {}
  std::vector<const Poisoned*> all() const {
    return {&offsets,  &padded, &row,       &token, &permuted, &y,
            &y_shared, &d_o,    &d_weights, &d_h,   &d_h_all};
  }
};

void run(const Context& ctx, const Data& d, const Outputs& out) {
  plan_permutation(ctx, d.experts, {out.offsets, out.padded}, out.row, out.token);
  permute(ctx, d.h, out.token, out.permuted);
  combine(ctx, d.o, d.weights, out.row, {}, out.y);
  combine(ctx, d.o, d.weights, out.row, d.shared, out.y_shared);
  combine_backward(ctx, d.dy, d.o, d.weights, out.row, out.d_o, out.d_weights);
  permute_backward(ctx, d.d_x, out.row, {}, {}, out.d_h);
  permute_backward(ctx, d.d_x, out.row, d.first, d.last, out.d_h_all);
}

std::vector<int> ints(const TensorView& x) {
  std::vector<int> out;
  for (const double v : values(x)) out.push_back(static_cast<int>(v));
  return out;
}

std::vector<double> magnitudes(std::vector<double> x) {
  for (double& v : x) v = std::abs(v);
  return x;
}

// |got - expected| <= roundings * ulp * sum of magnitudes + one rounding to the output's type.
void expect_near(const TensorView& got, const std::vector<double>& expected,
                 const std::vector<double>& size, double roundings, const char* what) {
  ASSERT_EQ(static_cast<std::size_t>(got.count()), expected.size());
  const double output = got.dtype == DType::kBf16 ? kBf16Ulp : kUlp;
  for (std::int64_t i = 0; i < got.count(); ++i) {
    const double bound =
        roundings * kUlp * size[i] * (1 + kBf16Ulp) + output * std::abs(expected[i]) + kTiny;
    EXPECT_LE(std::abs(get_value(got, i) - expected[i]), bound) << what << " " << i;
  }
}

TEST(Permute, AgainstReference) {
  tensor::Arena arena;
  for (const Case& c : kCases) {
    const Data d = make_data(c, 11);
    const Outputs out(c);
    run(context(arena, Isa::kPortable), d, out);
    for (const Poisoned* x : out.all()) EXPECT_TRUE(x->guards_intact() && x->all_written());
    const int C = static_cast<int>(c.C), D = static_cast<int>(c.D), T = static_cast<int>(c.T);
    const auto plan = reference::plan_permutation(ints(d.experts), C, static_cast<int>(c.E));
    EXPECT_EQ(ints(out.offsets), plan.offsets);
    EXPECT_EQ(ints(out.padded), plan.padded_offsets);
    EXPECT_EQ(ints(out.row), plan.row);
    EXPECT_EQ(ints(out.token), plan.token);
    EXPECT_EQ(values(out.permuted), reference::permute(values(d.h), D, plan.token));

    const auto o = values(d.o), w = values(d.weights), dy = values(d.dy), d_x = values(d.d_x);
    const auto shared = values(d.shared);
    const auto ao = magnitudes(o), aw = magnitudes(w);
    const double n = static_cast<double>(C) + 2;
    expect_near(out.y, reference::combine(o, D, w, C, plan.row, {}),
                reference::combine(ao, D, aw, C, plan.row, {}), n, "y");
    expect_near(out.y_shared, reference::combine(o, D, w, C, plan.row, shared),
                reference::combine(ao, D, aw, C, plan.row, magnitudes(shared)), n, "y_shared");
    const auto g = reference::combine_backward(dy, o, D, w, C, plan.row);
    const auto ag = reference::combine_backward(magnitudes(dy), ao, D, aw, C, plan.row);
    expect_near(out.d_o, g.d_o_MD, ag.d_o_MD, 1, "d_o");
    expect_near(out.d_weights, g.d_weights_TC, ag.d_weights_TC, static_cast<double>(D) / 32 + 8 + 5,
                "d_weights");
    auto d_h = reference::permute_backward(d_x, D, T, plan.token);
    auto ad_h = reference::permute_backward(magnitudes(d_x), D, T, plan.token);
    expect_near(out.d_h, d_h, ad_h, n, "d_h");
    for (std::size_t i = 0; i < d_h.size(); ++i) {
      const double a = get_value(d.first, i), b = get_value(d.last, i);
      d_h[i] += a + b;
      ad_h[i] += std::abs(a) + std::abs(b);
    }
    expect_near(out.d_h_all, d_h, ad_h, n + 2, "d_h_all");
  }
}

// The combine is linear in o and in the weights, so a difference quotient is exact up to rounding.
TEST(Permute, ReferenceBackwardAgainstDifferences) {
  const Case c{6, 3, 4, 5};
  const int C = 3, D = 5;
  const Data d = make_data(c, 12);
  const auto plan = reference::plan_permutation(ints(d.experts), C, 4);
  auto o = values(d.o), w = values(d.weights), h = values(d.h);
  const auto dy = values(d.dy), d_x = values(d.d_x);
  const auto dot = [](const std::vector<double>& a, const std::vector<double>& b) {
    double sum = 0;
    for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
    return sum;
  };
  const auto check = [&](std::vector<double>& x, const std::vector<double>& gradient, auto loss) {
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double keep = x[i], step = 1e-3;
      x[i] = keep + step;
      const double up = loss();
      x[i] = keep - step;
      const double down = loss();
      x[i] = keep;
      EXPECT_LE(std::abs((up - down) / (2 * step) - gradient[i]), 1e-9);
    }
  };
  const auto g = reference::combine_backward(dy, o, D, w, C, plan.row);
  const auto combined = [&] { return dot(dy, reference::combine(o, D, w, C, plan.row, {})); };
  check(o, g.d_o_MD, combined);
  check(w, g.d_weights_TC, combined);
  check(h, reference::permute_backward(d_x, D, 6, plan.token),
        [&] { return dot(d_x, reference::permute(h, D, plan.token)); });
}

TEST(Permute, SameBytesForIsaAndThreads) {
  tensor::Arena arena;
  for (const Case& c : kCases) {
    const Data d = make_data(c, 13);
    const Outputs base(c);
    run(context(arena, Isa::kPortable, 1), d, base);
    for (const Isa isa : supported_isas())
      for (const int threads : {1, 2}) {
        const Outputs other(c);
        run(context(arena, isa, threads), d, other);
        for (std::size_t i = 0; i < base.all().size(); ++i)
          EXPECT_TRUE(bytes_equal(*base.all()[i], *other.all()[i]))
              << tensor::isa_name(isa) << " threads " << threads << " output " << i;
      }
  }
}

// The written order of operations, as plain loops.
TEST(Permute, CombineHasTheWrittenBits) {
  tensor::Arena arena;
  for (const Case& c : kCases) {
    const Data d = make_data(c, 14);
    const Outputs out(c);
    run(tensor::cpu_context(arena, 1), d, out);
    const auto* row = out.row.view().as<std::int32_t>();
    const auto at = [&](const TensorView& x, std::int64_t r, std::int64_t i) {
      return numerics::to_float(x.as<Bf16>()[r * c.D + i]);
    };
    for (std::int64_t t = 0; t < c.T; ++t) {
      for (std::int64_t i = 0; i < c.D; ++i) {
        float y = 0, dh = 0 + at(d.first, t, i);
        for (std::int64_t k = 0; k < c.C; ++k) {
          const std::int64_t r = row[t * c.C + k];
          y = numerics::fma(d.weights.as<float>()[t * c.C + k], at(d.o, r, i), y);
          dh = dh + at(d.d_x, r, i);
        }
        EXPECT_EQ(numerics::to_bf16(y).bits, out.y.view().as<Bf16>()[t * c.D + i].bits);
        EXPECT_EQ(numerics::to_bf16(y + at(d.shared, t, i)).bits,
                  out.y_shared.view().as<Bf16>()[t * c.D + i].bits);
        EXPECT_EQ(numerics::to_bf16(dh + at(d.last, t, i)).bits,
                  out.d_h_all.view().as<Bf16>()[t * c.D + i].bits);
      }
      for (std::int64_t k = 0; k < c.C; ++k) {
        float lane[32] = {};
        for (std::int64_t i = 0; i < c.D; ++i)
          lane[i / 8 % 32] =
              numerics::fma(at(d.dy, t, i), at(d.o, row[t * c.C + k], i), lane[i / 8 % 32]);
        for (int step = 16; step >= 1; step /= 2)
          for (int l = 0; l < step; ++l) lane[l] = lane[l] + lane[l + step];
        EXPECT_EQ(lane[0], out.d_weights.view().as<float>()[t * c.C + k]);
      }
    }
  }
}

// A token's row of y and d_h is the same when it travels alone.
TEST(Permute, NeighboursDoNotMatter) {
  tensor::Arena arena;
  const Case c{17, 3, 4, 31}, one{1, 3, 4, 31};
  const Context ctx = tensor::cpu_context(arena, 1);
  const Data d = make_data(c, 15);
  const Outputs out(c);
  run(ctx, d, out);
  for (std::int64_t t = 0; t < c.T; ++t) {
    Data a = make_data(one, 16);
    const Outputs alone(one);
    std::memcpy(a.experts.view().data, d.experts.view().rows(t, 1).data, a.experts.view().bytes());
    std::memcpy(a.weights.view().data, d.weights.view().rows(t, 1).data, a.weights.view().bytes());
    plan_permutation(ctx, a.experts, {alone.offsets, alone.padded}, alone.row, alone.token);
    for (std::int64_t k = 0; k < c.C; ++k)
      for (const auto& [to, from] : {std::pair{&a.o, &d.o}, std::pair{&a.d_x, &d.d_x}})
        std::memcpy(to->view().rows(alone.row.view().as<std::int32_t>()[k], 1).data,
                    from->view().rows(out.row.view().as<std::int32_t>()[t * c.C + k], 1).data,
                    static_cast<std::size_t>(c.D) * sizeof(Bf16));
    combine(ctx, a.o, a.weights, alone.row, {}, alone.y);
    permute_backward(ctx, a.d_x, alone.row, {}, {}, alone.d_h);
    EXPECT_TRUE(bytes_equal(out.y.view().rows(t, 1), alone.y));
    EXPECT_TRUE(bytes_equal(out.d_h.view().rows(t, 1), alone.d_h));
  }
}

TEST(Permute, ScatterRowsUndoesPermute) {
  tensor::Arena arena;
  Rng rng(23);
  for (const Isa isa : supported_isas()) {
    const Context ctx = context(arena, isa, 3);
    const Tensor h = random_normal(rng, DType::kBf16, {9, 31}), rows = int32_tensor({7, 0, 3, 8});
    const Poisoned gathered(DType::kBf16, {4, 31}), back(DType::kBf16, {9, 31});
    permute(ctx, h, rows, gathered);
    scatter_rows(ctx, gathered, rows, back);
    EXPECT_TRUE(back.guards_intact());
    for (std::int64_t t = 0; t < 9; ++t) {
      const bool named = t == 7 || t == 0 || t == 3 || t == 8;
      const std::int64_t different = count_different(back.view().rows(t, 1), h.view().rows(t, 1));
      if (named)
        EXPECT_EQ(different, 0) << "row " << t;
      else
        for (std::int64_t d = 0; d < 31; ++d)
          EXPECT_EQ(back.view().as<Bf16>()[t * 31 + d].bits, 0xFFFF) << "row " << t;
    }
    EXPECT_THROW(scatter_rows(ctx, gathered, int32_tensor({7, 0, 3, 9}), back),
                 base::ContractError);
  }
}

TEST(Permute, RefusesIndicesOutOfRange) {
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const Case c{3, 2, 4, 8};
  const Data d = make_data(c, 17);
  const Outputs out(c);
  run(ctx, d, out);
  for (const int bad : {-1, 4}) {
    d.experts.as<std::int32_t>()[3] = bad;
    EXPECT_THROW(plan_permutation(ctx, d.experts, {out.offsets, out.padded}, out.row, out.token),
                 base::ContractError);
  }
  out.row.view().as<std::int32_t>()[2] = 6;
  out.token.view().as<std::int32_t>()[2] = 3;
  EXPECT_THROW(run(ctx, make_data(c, 17), Outputs({3, 2, 1, 8})), base::ContractError);
  EXPECT_THROW(permute(ctx, d.h, out.token, out.permuted), base::ContractError);
  EXPECT_THROW(combine(ctx, d.o, d.weights, out.row, {}, out.y), base::ContractError);
  EXPECT_THROW(combine_backward(ctx, d.dy, d.o, d.weights, out.row, out.d_o, out.d_weights),
               base::ContractError);
  EXPECT_THROW(permute_backward(ctx, d.d_x, out.row, {}, {}, out.d_h), base::ContractError);
  EXPECT_THROW(combine(ctx, d.o, d.weights, out.row, out.y_shared, out.permuted),
               base::ContractError);
}

}  // namespace
}  // namespace lockstep::ops::test

#include "ops/optimizer.h"

#include <gtest/gtest.h>

#include "elementwise_util.h"
#include "ops/reference/optimizer.h"

namespace lockstep::ops::test {
namespace {

using numerics::Bf16;

constexpr double kUlp = 0x1p-24;

// Options whose doubles are FP32 numbers, so that only the arithmetic differs from the reference.
AdamwOptions options_at(std::int64_t step) {
  AdamwOptions o;
  o.lr = static_cast<double>(3e-3f);
  o.beta1 = static_cast<double>(0.9f);
  o.beta2 = static_cast<double>(0.95f);
  o.eps = 0x1p-26;
  o.weight_decay = 0.1;
  o.clip = 0.7f;
  o.step = step;
  return o;
}

// The error that one step of FP32 AdamW may make in w, from the roundings of each of its terms.
double step_bound(const AdamwOptions& o, double w, double m_before, double v_after, double grad) {
  const double g = std::fabs(grad) * static_cast<double>(o.clip);
  const double parts = o.beta1 * std::fabs(m_before) + (1 - o.beta1) * g;
  const auto t = static_cast<double>(o.step);
  const double c1 = 1 / (1 - std::pow(o.beta1, t)), c2 = 1 / (1 - std::pow(o.beta2, t));
  const double below = std::sqrt(v_after * c2) + o.eps;
  return 3 * kUlp * std::fabs(w) + o.lr * 18 * kUlp * parts * c1 / below;
}

TEST(Adamw, OneStepAgainstTheReferenceAndTheContract) {
  Rng rng(1);
  for (const std::int64_t n : {0, 1, 17, 1031})
    for (const std::int64_t step : {1, 2, 1000}) {
      const AdamwOptions o = options_at(step);
      const Tensor grad = random_normal(rng, DType::kFp32, {n}, 0.01);
      const Tensor master = random_normal(rng, DType::kFp32, {n});
      for (const DType m_type : {DType::kFp32, DType::kBf16})
        for (const DType v_type : {DType::kFp32, DType::kBf16}) {
          const Tensor m = random_normal(rng, m_type, {n}, 0.01);
          const Tensor v = empty(v_type, {n});
          for (std::int64_t i = 0; i < n; ++i) set_value(v, i, 1e-4 * uniform(rng));
          if (n > 1) set_value(v, 0, 0.0), set_value(m, 0, 0.0), set_value(grad, 0, 0.0);
          reference::Adamw want{o.lr,           o.beta1,  o.beta2,        o.eps,     o.weight_decay,
                                double{o.clip}, step - 1, values(master), values(m), values(v)};
          reference::adamw_step(want, values(grad));
          on_all_contexts([&](const Context& ctx) {
            const Tensor master_now = copy_of(master), m_now = copy_of(m), v_now = copy_of(v);
            const Poisoned w(DType::kBf16, {n});
            adamw(ctx, grad, o, master_now, m_now, v_now, w);
            EXPECT_TRUE(w.guards_intact() && w.all_written());
            for (std::int64_t i = 0; i < n; ++i) {
              const std::size_t k = index(i);
              const double g = get_value(grad, i) * static_cast<double>(o.clip);
              EXPECT_LE(std::fabs(get_value(master_now, i) - want.w[k]),
                        step_bound(o, get_value(master, i), get_value(m, i), want.v[k],
                                   get_value(grad, i)));
              const double m_parts =
                  o.beta1 * std::fabs(get_value(m, i)) + (1 - o.beta1) * std::fabs(g);
              EXPECT_LE(
                  std::fabs(get_value(m_now, i) - want.m[k]),
                  4 * kUlp * m_parts + (m_type == DType::kBf16 ? bf16_rounding(m_parts) : 0.0));
              EXPECT_LE(
                  std::fabs(get_value(v_now, i) - want.v[k]),
                  5 * kUlp * want.v[k] + (v_type == DType::kBf16 ? bf16_rounding(want.v[k]) : 0.0));
              // Section 13, line by line.
              const auto b1 = static_cast<float>(o.beta1), b2 = static_cast<float>(o.beta2);
              const float gc = grad.as<float>()[i] * o.clip;
              const float mf = std::fma(b1, static_cast<float>(get_value(m, i)), (1 - b1) * gc);
              const float vf =
                  std::fma(b2, static_cast<float>(get_value(v, i)), (1 - b2) * (gc * gc));
              const auto t = static_cast<double>(step);
              const float mhat = mf * static_cast<float>(1 / (1 - std::pow(o.beta1, t)));
              const float vhat = vf * static_cast<float>(1 / (1 - std::pow(o.beta2, t)));
              float x = master.as<float>()[i];
              x = std::fma(-static_cast<float>(o.lr * o.weight_decay), x, x);
              x = x -
                  static_cast<float>(o.lr) * (mhat / (std::sqrt(vhat) + static_cast<float>(o.eps)));
              EXPECT_EQ(master_now.as<float>()[i], x);
              EXPECT_EQ(w.view().as<Bf16>()[i], numerics::to_bf16(x));
              EXPECT_EQ(get_value(m_now, i),
                        m_type == DType::kBf16 ? double{numerics::round_bf16(mf)} : double{mf});
              EXPECT_EQ(get_value(v_now, i),
                        v_type == DType::kBf16 ? double{numerics::round_bf16(vf)} : double{vf});
            }
          });
        }
    }
}

// Ten steps down a quadratic bowl; the reference sees the same gradients.
TEST(Adamw, TenStepsOnAQuadratic) {
  Rng rng(2);
  const std::int64_t n = 40;
  const Tensor target = random_normal(rng, DType::kFp32, {n});
  const Tensor master = empty(DType::kFp32, {n}), grad = empty(DType::kFp32, {n});
  const Tensor m = empty(DType::kFp32, {n}), v = empty(DType::kFp32, {n});
  const Tensor w = empty(DType::kBf16, {n});
  AdamwOptions o = options_at(1);
  o.lr = 0x1p-4;
  o.clip = 1.0f;
  reference::Adamw want{o.lr, o.beta1, o.beta2,        o.eps,     o.weight_decay,
                        1.0,  0,       values(master), values(m), values(v)};
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const auto loss = [&] {
    double sum = 0;
    for (std::int64_t i = 0; i < n; ++i)
      sum += std::pow(get_value(master, i) - get_value(target, i), 2);
    return sum;
  };
  const double start = loss();
  Values bound(index(n), 0.0);
  for (o.step = 1; o.step <= 10; ++o.step) {
    for (std::int64_t i = 0; i < n; ++i)
      set_value(grad, i, 2 * (get_value(master, i) - get_value(target, i)));
    adamw(ctx, grad, o, master, m, v, w);
    const Values m_before = want.m, w_before = want.w;
    reference::adamw_step(want, values(grad));
    // A moment keeps its earlier errors as it keeps its earlier terms: at most `step` of them.
    for (std::size_t k = 0; k < index(n); ++k)
      bound[k] +=
          static_cast<double>(o.step) * step_bound(o, w_before[k], m_before[k], want.v[k],
                                                   get_value(grad, static_cast<std::int64_t>(k)));
    for (std::int64_t i = 0; i < n; ++i)
      EXPECT_LE(std::fabs(get_value(master, i) - want.w[index(i)]), bound[index(i)]);
  }
  EXPECT_LT(loss(), 0.6 * start);
}

TEST(Adamw, OptionsOutOfRangeAreNamed) {
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const Tensor f = empty(DType::kFp32, {3}), w = empty(DType::kBf16, {3});
  const auto run = [&](const AdamwOptions& o) { adamw(ctx, f, o, f, f, f, w); };
  AdamwOptions o = options_at(0);
  EXPECT_THROW(run(o), base::ContractError);
  o = options_at(1);
  o.beta2 = 1.0;
  EXPECT_THROW(run(o), base::ContractError);
  o = options_at(1);
  o.clip = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(run(o), base::ContractError);
  EXPECT_THROW(adamw(ctx, f, options_at(1), f, f, f, f), base::ContractError);
  EXPECT_THROW(adamw(ctx, f, options_at(1), f, f, empty(DType::kFp32, {4}), w),
               base::ContractError);
}

// Section 13, lane by lane.
double scalar_lane_sum(const Values& terms) {
  Values lane(32, 0.0);
  for (std::size_t i = 0; i < terms.size(); ++i) lane[i / 8 % 32] += terms[i];
  for (std::size_t d = 16; d >= 1; d /= 2)
    for (std::size_t l = 0; l < d; ++l) lane[l] = lane[l] + lane[l + d];
  return lane[0];
}

Values scalar_chunk_sums(const Values& terms) {
  Values out;
  for (std::size_t i = 0; i < terms.size(); i += 4096) {
    const auto begin = terms.begin() + static_cast<std::ptrdiff_t>(i);
    const auto end = terms.begin() + static_cast<std::ptrdiff_t>(std::min(terms.size(), i + 4096));
    out.push_back(scalar_lane_sum(Values(begin, end)));
  }
  return out;
}

void check_norm(Rng& rng, const std::vector<std::int64_t>& counts) {
  std::vector<Tensor> tensors;
  std::vector<TensorView> views;
  Values all, sums;
  for (const std::int64_t n : counts) {
    tensors.push_back(random_normal(rng, DType::kFp32, {n}));
    views.push_back(tensors.back());
    Values squares;
    for (const double x : values(tensors.back())) {
      all.push_back(x);
      squares.push_back(x * x);
    }
    for (const double s : scalar_chunk_sums(squares)) sums.push_back(s);
  }
  while (sums.size() > 1) sums = scalar_chunk_sums(sums);
  const double want = sums.empty() ? 0.0 : std::sqrt(sums[0]);
  const double near = reference::norm(all);
  on_all_contexts([&](const Context& ctx) {
    const double got = global_norm(ctx, views);
    EXPECT_EQ(std::memcmp(&got, &want, sizeof(double)), 0) << got << " against " << want;
    EXPECT_LE(std::fabs(got - near), static_cast<double>(all.size() + 2) * 0x1p-53 * near);
  });
}

TEST(GlobalNorm, FollowsTheContract) {
  Rng rng(3);
  check_norm(rng, {});
  check_norm(rng, {0, 0});
  check_norm(rng, {1});
  check_norm(rng, {4096});
  check_norm(rng, {4097, 0, 255, 8191});
  check_norm(rng, std::vector<std::int64_t>(4100, 3));  // more chunk sums than one chunk holds
}

TEST(GlobalNorm, NonFiniteValues) {
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const Tensor a = empty(DType::kFp32, {5000}), b = empty(DType::kFp32, {3});
  EXPECT_EQ(global_norm(ctx, {a, b}), 0.0);
  a.as<float>()[4999] = std::numeric_limits<float>::max();
  EXPECT_TRUE(std::isfinite(global_norm(ctx, {a, b})));
  a.as<float>()[4999] = -std::numeric_limits<float>::infinity();
  EXPECT_EQ(global_norm(ctx, {a, b}), std::numeric_limits<double>::infinity());
  b.as<float>()[1] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(global_norm(ctx, {a, b})));
}

TEST(ClipFactor, Cases) {
  EXPECT_EQ(clip_factor(0.5, 1.0), 1.0f);
  EXPECT_EQ(clip_factor(0.0, 1.0), 1.0f);
  EXPECT_EQ(clip_factor(4.0, 1.0), static_cast<float>(1.0 / 4.000001));
  EXPECT_EQ(clip_factor(1e9, 0.0), 1.0f);
  EXPECT_EQ(clip_factor(1e9, -1.0), 1.0f);
  EXPECT_EQ(clip_factor(std::numeric_limits<double>::infinity(), 1.0), 0.0f);
  EXPECT_TRUE(std::isnan(clip_factor(std::numeric_limits<double>::quiet_NaN(), 1.0)));
  EXPECT_THROW(clip_factor(1.0, std::numeric_limits<double>::quiet_NaN()), base::ContractError);
}

TEST(CountNonfinite, Fp32AndBf16) {
  const Tensor all = empty(DType::kBf16, {65536});
  for (std::int64_t i = 0; i < 65536; ++i) all.as<Bf16>()[i].bits = static_cast<std::uint16_t>(i);
  const Tensor wide = empty(DType::kFp32, {65536});
  for (std::int64_t i = 0; i < 65536; ++i)
    wide.as<float>()[i] = numerics::to_float(all.as<Bf16>()[i]);
  wide.as<float>()[0] = std::numeric_limits<float>::max();
  on_all_contexts([&](const Context& ctx) {
    EXPECT_EQ(count_nonfinite(ctx, all), 256);
    EXPECT_EQ(count_nonfinite(ctx, wide), 256);
    EXPECT_EQ(count_nonfinite(ctx, empty(DType::kFp32, {0})), 0);
    EXPECT_THROW(count_nonfinite(ctx, empty(DType::kInt32, {1})), base::ContractError);
  });
}

}  // namespace
}  // namespace lockstep::ops::test

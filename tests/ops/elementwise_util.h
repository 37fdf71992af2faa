// Shared by the tests of elementwise ops: all contexts, the rounding of BF16, central differences.
#pragma once

#include <functional>

#include "op_test_util.h"

namespace lockstep::ops::test {

using Values = std::vector<double>;

inline std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

// A step of BF16 at most halves: the largest rounding error of a result of this size.
inline double bf16_rounding(double v) { return std::fabs(v) * 0x1p-8 * (1 + 0x1p-7) + 0x1p-134; }

// Runs `body` on every instruction set, and on the widest one with two threads.
inline void on_all_contexts(const std::function<void(const Context&)>& body) {
  tensor::Arena arena;
  std::vector<Context> contexts{context(arena, supported_isas().back(), 2)};
  for (const Isa isa : supported_isas()) contexts.push_back(context(arena, isa, 1));
  for (const Context& ctx : contexts) {
    SCOPED_TRACE(fmt::format("{} threads {}", tensor::isa_name(ctx.isa), ctx.threads));
    body(ctx);
  }
}

inline Tensor copy_of(const TensorView& x) {
  Tensor out = empty(x.dtype, x.shape);
  if (x.bytes() > 0) std::memcpy(out.view().data, x.data, x.bytes());
  return out;
}

inline Values random_values(Rng& rng, std::int64_t n) {
  Values out(index(n));
  for (double& v : out) v = static_cast<double>(normal(rng));
  return out;
}

// d loss / d x of loss = sum(c * f(x)) by central differences.
inline Values differences(const std::function<Values(const Values&)>& f, const Values& c,
                          Values x) {
  const double h = 1e-5;
  const auto loss = [&](const Values& at) {
    const Values y = f(at);
    double sum = 0;
    for (std::size_t i = 0; i < y.size(); ++i) sum += c[i] * y[i];
    return sum;
  };
  Values out(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double v = x[i];
    x[i] = v + h;
    const double up = loss(x);
    x[i] = v - h;
    out[i] = (up - loss(x)) / (2 * h);
    x[i] = v;
  }
  return out;
}

// Differences err by about h^2 = 1e-10 and 1e-16 / h = 1e-11, times a few tens of terms.
inline void expect_near_differences(const Values& got, const Values& want) {
  ASSERT_EQ(got.size(), want.size());
  for (std::size_t i = 0; i < got.size(); ++i)
    EXPECT_LE(std::fabs(got[i] - want[i]), 2e-8 * (1 + std::fabs(want[i])));
}

}  // namespace lockstep::ops::test

#include "ops/embedding.h"

#include <gtest/gtest.h>

#include "elementwise_util.h"
#include "ops/reference/embedding.h"

namespace lockstep::ops::test {
namespace {

TEST(Embedding, ForwardAndBackward) {
  Rng rng(1);
  const std::int64_t V = 23;
  for (const std::int64_t T : {0, 1, 3, 500})
    for (const std::int64_t D : {1, 63, 65, 130}) {
      const Tensor w = random_normal(rng, DType::kBf16, {V, D});
      const Tensor dx = random_normal(rng, DType::kBf16, {T, D});
      const Tensor before = random_normal(rng, DType::kFp32, {V, D});
      std::vector<std::int32_t> ids;
      for (std::int64_t t = 0; t < T; ++t)
        ids.push_back(static_cast<std::int32_t>(uniform_int(rng, 0, V - 1)));
      if (T > 2) ids[0] = 0, ids[1] = static_cast<std::int32_t>(V - 1);
      const Tensor tokens = int32_tensor(ids);
      const std::vector<std::int64_t> wide(ids.begin(), ids.end());
      const Values want = reference::embedding(wide, values(w), D);
      const Values want_dw = reference::embedding_backward(wide, values(dx), V, D);
      Values terms = values(before);
      for (double& v : terms) v = std::fabs(v);
      for (std::int64_t i = 0; i < T * D; ++i)
        terms[index(wide[index(i / D)] * D + i % D)] += std::fabs(get_value(dx, i));
      // The order of the contract.
      const Tensor order = copy_of(before);
      for (std::int64_t i = 0; i < T * D; ++i) {
        float& to = order.as<float>()[wide[index(i / D)] * D + i % D];
        to = to + numerics::to_float(dx.as<numerics::Bf16>()[i]);
      }
      on_all_contexts([&](const Context& ctx) {
        const Poisoned x(DType::kBf16, {T, D});
        embedding(ctx, tokens, w, x);
        EXPECT_TRUE(x.guards_intact() && x.all_written());
        for (std::int64_t i = 0; i < T * D; ++i) EXPECT_EQ(get_value(x, i), want[index(i)]);
        const Tensor dw = copy_of(before);
        embedding_backward(ctx, tokens, dx, dw);
        EXPECT_TRUE(bytes_equal(dw, order));
        for (std::int64_t i = 0; i < V * D; ++i)
          EXPECT_LE(std::fabs(get_value(dw, i) - (get_value(before, i) + want_dw[index(i)])),
                    static_cast<double>(T) * 0x1p-24 * terms[index(i)]);
      });
    }
}

TEST(Embedding, ReferenceBackwardAgainstDifferences) {
  Rng rng(2);
  const std::vector<std::int64_t> tokens{3, 0, 3, 1};
  const Values w = random_values(rng, 5 * 3), c = random_values(rng, 4 * 3);
  expect_near_differences(
      reference::embedding_backward(tokens, c, 5, 3),
      differences([&](const Values& at) { return reference::embedding(tokens, at, 3); }, c, w));
}

TEST(Embedding, ATokenOutsideIsNamed) {
  tensor::Arena arena;
  const Context ctx = tensor::cpu_context(arena, 1);
  const Tensor w = empty(DType::kBf16, {4, 2}), x = empty(DType::kBf16, {2, 2});
  const Tensor dw = empty(DType::kFp32, {4, 2});
  for (const std::int32_t bad : {-1, 4}) {
    const Tensor tokens = int32_tensor({0, bad});
    try {
      embedding(ctx, tokens, w, x);
      ADD_FAILURE() << "token " << bad << " was taken";
    } catch (const base::ContractError& error) {
      EXPECT_NE(std::string(error.what()).find(fmt::format("token {} at place 1", bad)),
                std::string::npos);
    }
    EXPECT_THROW(embedding_backward(ctx, tokens, x, dw), base::ContractError);
  }
}

}  // namespace
}  // namespace lockstep::ops::test

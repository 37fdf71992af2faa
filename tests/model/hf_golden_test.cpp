// The double-precision reference against what PyTorch computed in FP32 (tests/data/hf).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "model/golden_gap.h"

namespace lockstep::model {
namespace {

constexpr double kFp32 = 0x1p-24;  // unit roundoffs
constexpr double kBf16 = 0x1p-8;

struct HfGoldenTest : testing::TestWithParam<const char*> {
  const HfGolden golden = load_hf_golden(GetParam());
  // As PyTorch computed it: rotary frequencies rounded to BF16 (tests/data/hf/README.md).
  const ReferenceModel torch_model = golden_model(golden);
};
INSTANTIATE_TEST_SUITE_P(Families, HfGoldenTest, testing::ValuesIn(kGoldenFamilies),
                         [](const auto& info) { return std::string(info.param); });
INSTANTIATE_TEST_SUITE_P(Options, HfGoldenTest, testing::ValuesIn(kGoldenOptions),
                         [](const auto& info) { return std::string(info.param); });

// The rounding errors of a sum of n products in FP32 behave like a random walk: they stay within
// lambda sqrt(n) u sum |a b| but for a probability of 2 exp(-lambda^2 / 2) (Higham, Mary: A new
// approach to probabilistic rounding error analysis, 2019). lambda = 6 leaves 3e-8 for each logit.
TEST_P(HfGoldenTest, logits) {
  const auto expected = golden_values(golden.reference, "logits_fp32");
  const ReferenceMatrix& head = head_of(torch_model);
  std::size_t at = 0;
  double worst = 0;
  for (const auto& tokens : golden.sequences) {
    const ReferencePass pass = reference_forward(torch_model, tokens);
    for (std::int64_t t = 0; t < pass.logits.rows; ++t)
      for (std::int64_t v = 0; v < pass.logits.columns; ++v, ++at) {
        double magnitude = 0;
        for (std::int64_t k = 0; k < head.columns; ++k)
          magnitude += std::fabs(pass.hidden.row(t)[k] * head.row(v)[k]);
        const double bound = 6 * std::sqrt(static_cast<double>(head.columns)) * kFp32 * magnitude;
        const double error = std::fabs(pass.logits.row(t)[v] - expected[at]);
        ASSERT_LE(error, bound) << "token " << t << " logit " << v;
        worst = std::max(worst, error);
      }
  }
  EXPECT_EQ(at, expected.size());
  EXPECT_LE(worst, 1e-5);
}

// The golden gradients are stored in BF16, their norms in FP32. Besides that rounding an element
// may carry PyTorch's own FP32 error: it went through at most 20 sums of about 256 products, each a
// random walk as above, relative to the tensor's root mean square. A norm is one sum of squares.
TEST_P(HfGoldenTest, loss_and_every_gradient) {
  const HfGolden& g = golden;
  ReferenceParams gradients;
  const double loss = reference_loss(torch_model, g.sequences, &gradients);
  const double expected_loss = golden_values(g.reference, "loss")[0];
  EXPECT_LE(std::fabs(loss - expected_loss), 4 * kFp32 * expected_loss);

  EXPECT_EQ(gradients.size(), g.gradients.tensors.size());
  std::map<std::string, double> squares, counts;  // by name of the norm
  const double fp32_error = 6 * std::sqrt(20 * 256.0) * kFp32;
  for (const auto& [name, gradient] : gradients) {
    const auto expected = golden_values(g.gradients, name);
    ASSERT_EQ(expected.size(), gradient.values.size()) << name;
    double square = 0;
    for (const double x : gradient.values) square += x * x;
    squares[golden_norm_name(name)] += square;
    counts[golden_norm_name(name)] += static_cast<double>(expected.size());
    const double rms = std::sqrt(square / static_cast<double>(expected.size()));
    for (std::size_t i = 0; i < expected.size(); ++i)
      ASSERT_LE(std::fabs(gradient.values[i] - expected[i]),
                kBf16 * std::fabs(expected[i]) + fp32_error * rms)
          << name << " element " << i;
  }
  for (const auto& [name, square] : squares) {
    const double expected = golden_values(g.reference, "grad_norm/" + name)[0];
    EXPECT_LE(std::fabs(std::sqrt(square) - expected),
              (3 * std::sqrt(counts[name]) * kFp32 + fp32_error) * expected)
        << name;
  }
}

// Ten steps on one batch with the settings of ReferenceAdamw. Losses fall from 6 to 0.2 and the
// optimizer amplifies rounding errors by about ten, from the 6e-8 of the first.
TEST_P(HfGoldenTest, ten_adamw_losses) {
  ReferenceModel model = torch_model;
  ReferenceAdamw state;
  for (const double expected : golden_values(golden.reference, "adamw_losses")) {
    ReferenceParams gradients;
    const double loss = reference_loss(model, golden.sequences, &gradients);
    EXPECT_LE(std::fabs(loss - expected), 5e-6 * expected) << "step " << state.step;
    reference_adamw(state, gradients, model.params);
  }
  EXPECT_EQ(state.step, 10);
}

// The oracle's own backward, apart from PyTorch: a central difference in double along a fixed
// direction of all parameters.
TEST_P(HfGoldenTest, gradient_is_the_slope_of_the_loss) {
  const ReferenceModel& model = torch_model;
  const std::vector<std::vector<std::int32_t>> one = {golden.sequences[1]};
  ReferenceParams gradients;
  reference_loss(model, one, &gradients);
  ReferenceModel plus = model, minus = model;
  const double h = 1e-6;
  double slope = 0;
  std::uint64_t state = 1;
  for (const auto& [name, gradient] : gradients)
    for (std::size_t i = 0; i < gradient.values.size(); ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      const double direction = static_cast<double>(state >> 40) * 0x1p-23 - 1.0;
      slope += gradient.values[i] * direction;
      plus.params.at(name).values[i] += h * direction;
      minus.params.at(name).values[i] -= h * direction;
    }
  // The routing is held, as the gradient does.
  ReferenceRouting routing;
  for (const ReferenceLayer& layer : reference_forward(model, one[0]).layers)
    routing.push_back(layer.experts);
  const double difference = (reference_loss(plus, one, nullptr, &routing) -
                             reference_loss(minus, one, nullptr, &routing)) /
                            (2 * h);
  EXPECT_LE(std::fabs(difference - slope), 1e-6 * std::fabs(slope) + 1e-7)
      << difference << " " << slope;
}

TEST_P(HfGoldenTest, greedy_tokens) {
  const auto tokens = reference_greedy(torch_model, golden.sequences[0], 24);
  EXPECT_EQ(tokens, golden.greedy);
}

}  // namespace
}  // namespace lockstep::model

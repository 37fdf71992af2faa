// The double-precision reference against what PyTorch computed in FP32 (tests/data/hf).
#include "model/hf_golden.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

namespace lockstep::model {
namespace {

constexpr double kFp32 = 0x1p-24;  // unit roundoffs
constexpr double kBf16 = 0x1p-8;

const HfGolden& golden() {
  static const HfGolden g = load_hf_golden("qwen3_moe");
  return g;
}

// The model as PyTorch computed it: rotary frequencies rounded to BF16 (tests/data/hf/README.md).
const ReferenceModel& torch_model() {
  static const ReferenceModel model = golden_model(golden());
  return model;
}

// The rounding errors of a sum of n products in FP32 behave like a random walk: they stay within
// lambda sqrt(n) u sum |a b| but for a probability of 2 exp(-lambda^2 / 2) (Higham, Mary: A new
// approach to probabilistic rounding error analysis, 2019). lambda = 6 leaves 3e-8 for each logit.
TEST(HfGolden, logits) {
  const auto expected = golden_values(golden().reference, "logits_fp32");
  const ReferenceMatrix& head = torch_model().params.at("lm_head.weight");
  std::size_t at = 0;
  double worst = 0;
  for (const auto& tokens : golden().sequences) {
    const ReferencePass pass = reference_forward(torch_model(), tokens);
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
  std::printf("worst %g\n", worst);
}

// The golden gradients are stored in BF16 (every element to 2^-9), their norms in FP32.
TEST(HfGolden, loss_and_every_gradient) {
  const HfGolden& g = golden();
  ReferenceParams gradients;
  const double loss = reference_loss(torch_model(), g.sequences, &gradients);
  const double expected_loss = golden_values(g.reference, "loss")[0];
  EXPECT_LE(std::fabs(loss - expected_loss), 4 * kFp32 * expected_loss);

  EXPECT_EQ(gradients.size(), g.gradients.tensors.size());
  std::map<std::string, double> squares;  // by name of the norm
  double wr = 0;
  for (const auto& [name, gradient] : gradients) {
    const auto expected = golden_values(g.gradients, name);
    ASSERT_EQ(expected.size(), gradient.values.size()) << name;
    double norm = 0;
    for (const double x : gradient.values) norm += x * x;
    squares[golden_norm_name(name)] += norm;
    // FP32 errors of an element, relative to the tensor's root mean square.
    const double rms = std::sqrt(norm / static_cast<double>(expected.size()));
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const double x = gradient.values[i];
      const double rest = std::fabs(x - expected[i]) - kBf16 * std::fabs(x) * (1 + 1e-3);
      wr = std::max(wr, rest / rms);
    }
  }
  std::printf("loss err %g, worst rest/rms %g\n", (loss - expected_loss) / loss, wr);
  double wn = 0;
  for (const auto& [name, square] : squares) {
    const double expected = golden_values(g.reference, "grad_norm/" + name)[0];
    EXPECT_LE(std::fabs(std::sqrt(square) - expected), 1e-5 * expected) << name;
    wn = std::max(wn, std::fabs(std::sqrt(square) - expected) / expected);
  }
  std::printf("norm %g\n", wn);
}

TEST(HfGolden, ten_adamw_losses) {
  ReferenceModel model = torch_model();
  ReferenceAdamw state;
  int step = 0;
  for (const double expected : golden_values(golden().reference, "adamw_losses")) {
    ReferenceParams gradients;
    const double loss = reference_loss(model, golden().sequences, &gradients);
    std::printf("%d %g\n", step, (loss - expected) / expected);
    reference_adamw(state, gradients, model.params);
    ++step;
  }
}

TEST(HfGolden, greedy_tokens) {
  const auto tokens = reference_greedy(torch_model(), golden().sequences[0], 24);
  EXPECT_EQ(tokens, golden().greedy);
}

}  // namespace
}  // namespace lockstep::model

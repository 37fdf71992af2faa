// The double-precision reference against what PyTorch computed in FP32 (tests/data/hf).
#include "model/hf_golden.h"

#include <gtest/gtest.h>

#include <cmath>

namespace lockstep::model {
namespace {

constexpr double kFp32 = 0x1p-24;  // unit roundoff
constexpr double kBf16 = 0x1p-8;

const HfGolden& golden() {
  static const HfGolden g = load_hf_golden("qwen3_moe");
  return g;
}

const ReferenceParams& params() {
  static const ReferenceParams p = reference_params(golden().weights);
  return p;
}

TEST(HfGolden, logits) {
  const HfGolden& g = golden();
  const auto expected = golden_values(g.reference, "logits_fp32");
  std::size_t i = 0;
  double worst = 0, largest = 0, ratio=0;
  for (const auto& tokens : g.sequences) {
    const ReferencePass pass = reference_forward(g.weights.config, params(), tokens);
    for (std::int64_t t = 0; t < pass.logits.rows; ++t)
    for (std::int64_t v = 0; v < pass.logits.columns; ++v, ++i) {
      double s = 0;
      for (int k = 0; k < pass.hidden.columns; ++k) s += std::fabs(pass.hidden.row(t)[k] * params().at("lm_head.weight").row(v)[k]);
      const double logit = pass.logits.row(t)[v];
      worst = std::max(worst, std::fabs(logit - expected[i]));
      ratio = std::max(ratio, std::fabs(logit - expected[i])/s/kFp32);
      largest = std::max(largest, std::fabs(logit));
    }
  }
  std::printf("logits %g of %g ratio %g\n", worst, largest, ratio);
}

TEST(HfGolden, loss_and_gradients) {
  const HfGolden& g = golden();
  ReferenceParams gradients;
  const double loss = reference_loss(g.weights.config, params(), g.sequences, &gradients);
  const double expected_loss = golden_values(g.reference, "loss")[0];
  std::printf("loss %.9g %.9g\n", loss, expected_loss);
  double worst = 0, wn = 0;
  for (const auto& [name, gradient] : gradients) {
    const auto expected = golden_values(g.gradients, name);
    ASSERT_EQ(expected.size(), gradient.values.size());
    double norm = 0, big = 0;
    for (double x : gradient.values) norm += x * x, big = std::max(big, std::fabs(x));
    norm = std::sqrt(norm);
    const double en = golden_values(g.reference, "grad_norm/" + name)[0];
    wn = std::max(wn, std::fabs(norm - en) / (norm + 1e-30));
    for (std::size_t i = 0; i < expected.size(); ++i)
      worst = std::max(worst, (std::fabs(expected[i] - gradient.values[i]) - std::fabs(gradient.values[i]) * kBf16/2) /
                        (big+1e-30));
  }
  std::printf("worst %g norms %g\n", worst, wn);
}

TEST(HfGolden, ten_adamw_losses) {
  const HfGolden& g = golden();
  const auto expected = golden_values(g.reference, "adamw_losses");
  ReferenceParams p = params();
  ReferenceAdamw state;
  for (double e : expected) {
    ReferenceParams gradients;
    const double loss = reference_loss(g.weights.config, p, g.sequences, &gradients);
    std::printf("%.9g %.9g %g\n", loss, e, (loss - e) / e);
    reference_adamw(state, gradients, p);
  }
}

TEST(HfGolden, greedy_tokens) {
  const HfGolden& g = golden();
  std::vector<double> gaps;
  const auto tokens = reference_greedy(g.weights.config, params(), g.sequences[0], 24, &gaps);
  EXPECT_EQ(tokens, g.greedy);
  std::printf("gap %g\n", *std::min_element(gaps.begin(), gaps.end()));
}

}  // namespace
}  // namespace lockstep::model

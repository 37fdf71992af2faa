// The engine in BF16 and in FP8 against the double-precision reference on the Hugging Face
// checkpoint.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "model/golden_gap.h"

namespace lockstep::model {
namespace {

struct HfEngine : testing::TestWithParam<const char*> {
  HfGolden golden = load_hf_golden(GetParam());
  ReferenceModel reference = reference_model(golden.weights);
};
INSTANTIATE_TEST_SUITE_P(Families, HfEngine, testing::ValuesIn(kGoldenFamilies),
                         [](const auto& info) { return std::string(info.param); });
INSTANTIATE_TEST_SUITE_P(Options, HfEngine, testing::ValuesIn(kGoldenOptions),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(HfEngine, bf16_logits_are_within_the_rounding_bound) {
  const EngineRun run = run_engine(golden.weights, {}, golden.sequences);
  const GoldenGap gap = expect_golden_gap(golden, run, bf16_noise(golden.weights.config));
  std::printf("bf16: %s\n", gap.text().c_str());
  EXPECT_LE(10 * static_cast<std::int64_t>(gap.flips.size()), gap.choices);
}

TEST_P(HfEngine, bf16_greedy_tokens_differ_only_at_near_ties) {
  std::vector<std::int32_t> tokens = golden.sequences[0];
  int differ = 0;
  for (std::size_t i = tokens.size(); i < golden.greedy.size(); ++i) {
    const EngineRun run = run_engine(golden.weights, {}, {tokens});
    const std::int64_t V = golden.weights.config.vocab_size;
    const float* z = run.logits_TV.data() + static_cast<std::int64_t>(run.logits_TV.size()) - V;
    const auto best = static_cast<std::int32_t>(std::max_element(z, z + V) - z);
    const ReferencePass pass = reference_forward(reference, tokens, &run.routing);
    const double* r = pass.logits.row(pass.logits.rows - 1);
    const auto top = std::max_element(r, r + V) - r;
    if (best != top) {
      ++differ;
      const ReferenceMatrix& w = head_of(reference);
      const double noise = bf16_noise(golden.weights.config);
      const std::int64_t t = pass.hidden.rows - 1;
      EXPECT_LE(r[top] - r[best], logit_bound(noise, pass.hidden, t, w.row(top)) +
                                      logit_bound(noise, pass.hidden, t, w.row(best)))
          << "position " << i << " is not a near-tie";
    }
    tokens.push_back(golden.greedy[i]);  // stay on PyTorch's path
  }
  std::printf("greedy: %d of 24 differ from the reference\n", differ);
}

TEST_P(HfEngine, fp8_logits_are_within_the_quantization_bound) {
  for (const Recipe recipe : {Recipe::kBlockwise, Recipe::kRowwise, Recipe::kTensorwise}) {
    Precision precision;
    precision.fp8 = true;
    precision.recipe = recipe;
    const EngineRun run = run_engine(golden.weights, precision, golden.sequences);
    const GoldenGap gap = expect_golden_gap(golden, run, fp8_noise(golden.weights.config));
    const char* names[] = {"blockwise", "rowwise", "tensorwise"};
    std::printf("fp8 %s: %s\n", names[static_cast<int>(recipe)], gap.text().c_str());
    EXPECT_GT(gap.logits, 1e-3);  // it did run in FP8
  }
}

}  // namespace
}  // namespace lockstep::model

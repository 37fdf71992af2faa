// The engine in BF16 and in FP8 against the double-precision reference on the Hugging Face
// checkpoint.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "model/engine_run.h"
#include "model/hf_golden.h"

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

double norm(const double* x, std::int64_t n) {
  double s = 0;
  for (std::int64_t i = 0; i < n; ++i) s += x[i] * x[i];
  return std::sqrt(s);
}

struct Gap {
  double logits = 0, bound_used = 0;  // largest error, largest error / bound
  double probability = 0;             // largest |log-probability| error of the true next token
  int flips = 0;                      // tokens whose routers chose other experts than the reference
  double widest_flip = 0;             // largest distance of the scores' logits in such a choice
};

// Compares under the engine's own routing, so that a flipped near-tie counts once, where it
// happens. `noise` is the standard deviation of the relative error of a hidden state's element; a
// dot product with w then errs by noise * rms(h) * |w|, and six times that bounds every logit of
// the model and of the routers.
Gap compare(const HfGolden& golden, const ReferenceModel& reference, const EngineRun& run,
            double noise) {
  Gap gap;
  const ModelConfig& c = golden.weights.config;
  std::int64_t first = 0;
  for (const auto& tokens : golden.sequences) {
    const ReferencePass pass = reference_forward(reference, tokens, &run.routing, first);
    const auto bound = [&](const ReferenceMatrix& h, std::int64_t t, const double* w) {
      return 6 * noise * norm(h.row(t), h.columns) / std::sqrt(static_cast<double>(h.columns)) *
             norm(w, h.columns);
    };
    for (std::int64_t t = 0; t < pass.logits.rows; ++t) {
      for (std::int64_t v = 0; v < c.vocab_size; ++v) {
        const double error =
            std::fabs(static_cast<double>(run.logits_TV[(first + t) * c.vocab_size + v]) -
                      pass.logits.row(t)[v]);
        const double limit = bound(pass.hidden, t, reference.params.at("lm_head.weight").row(v));
        EXPECT_LE(error, limit) << "token " << first + t << " logit " << v;
        gap.logits = std::max(gap.logits, error);
        gap.bound_used = std::max(gap.bound_used, error / limit);
      }
      for (std::size_t l = 0; l < pass.layers.size(); ++l) {
        const ReferenceLayer& layer = pass.layers[l];
        const double* p = layer.scores.row(t);
        const int* chosen = layer.experts.data() + t * c.router.top_k;
        const ReferenceMatrix& w =
            reference.params.at(router_name(c, static_cast<std::int64_t>(l)));
        bool flipped = false;
        for (int i = 0; i < c.router.top_k; ++i)
          for (int e = 0; e < c.num_experts; ++e) {
            if (p[e] <= p[chosen[i]] || std::count(chosen, chosen + c.router.top_k, e)) continue;
            const double distance = std::log(p[e] / p[chosen[i]]);
            EXPECT_LE(distance, bound(layer.h2, t, w.row(e)) + bound(layer.h2, t, w.row(chosen[i])))
                << "token " << first + t << " layer " << l << ": not a near-tie";
            gap.widest_flip = std::max(gap.widest_flip, distance);
            flipped = true;
          }
        gap.flips += flipped;
      }
    }
    first += pass.logits.rows;
  }
  return gap;
}

void print(const char* name, const Gap& gap) {
  std::printf("%s: logits within %.3g (%.0f %% of the bound), %d router flips, the widest %.3g\n",
              name, gap.logits, 100 * gap.bound_used, gap.flips, gap.widest_flip);
}

// A value rounded to p significant bits errs by a uniform relative error of at most 2^-p, so of
// standard deviation 2^-p / sqrt(3) at most. `roundings` of them in a chain add as variances.
double rounding_noise(int bits, double roundings) {
  return std::ldexp(1.0, -bits) * std::sqrt(roundings / 3);
}

// BF16 roundings from the embedding to the final norm's output: per layer h, q|k|v, rotated heads,
// p, attention, o, residual, h, gate|up, activation, down, combined, residual; then the final norm.
constexpr double kBf16Roundings = 2 * 13 + 1;

TEST_P(HfEngine, bf16_logits_are_within_the_rounding_bound) {
  const double noise = rounding_noise(8, kBf16Roundings);
  const Gap gap =
      compare(golden, reference, run_engine(golden.weights, {}, golden.sequences), noise);
  print("bf16", gap);
  EXPECT_LE(gap.flips, 24);  // of 240 choices
}

TEST_P(HfEngine, bf16_greedy_tokens_differ_only_at_near_ties) {
  std::vector<std::int32_t> tokens = golden.sequences[0];
  int differ = 0;
  for (std::size_t i = tokens.size(); i < golden.greedy.size(); ++i) {
    const EngineRun run = run_engine(golden.weights, {}, {tokens});
    const float* z = run.logits_TV.data() + run.logits_TV.size() - 320;
    const auto best = static_cast<std::int32_t>(std::max_element(z, z + 320) - z);
    const ReferencePass pass = reference_forward(reference, tokens, &run.routing);
    const double* r = pass.logits.row(pass.logits.rows - 1);
    const double h = norm(pass.hidden.row(pass.hidden.rows - 1), 256) / 16;
    const auto top = std::max_element(r, r + 320) - r;
    if (best != top) {
      ++differ;
      const ReferenceMatrix& w = reference.params.at("lm_head.weight");
      EXPECT_LE(r[top] - r[best], 6 * rounding_noise(8, kBf16Roundings) * h *
                                      (norm(w.row(top), 256) + norm(w.row(best), 256)))
          << "position " << i << " is not a near-tie";
    }
    tokens.push_back(golden.greedy[i]);  // stay on PyTorch's path
  }
  std::printf("greedy: %d of 24 differ from the reference\n", differ);
}

// Each of the four linears of a layer rounds both operands to four significant bits (E4M3).
TEST_P(HfEngine, fp8_logits_are_within_the_quantization_bound) {
  for (const Recipe recipe : {Recipe::kBlockwise, Recipe::kRowwise, Recipe::kTensorwise}) {
    Precision precision;
    precision.fp8 = true;
    precision.recipe = recipe;
    const double noise =
        std::hypot(rounding_noise(4, 2 * 4 * 2), rounding_noise(8, kBf16Roundings));
    const EngineRun run = run_engine(golden.weights, precision, golden.sequences);
    const Gap gap = compare(golden, reference, run, noise);
    const char* names[] = {"fp8 blockwise", "fp8 rowwise", "fp8 tensorwise"};
    print(names[static_cast<int>(recipe)], gap);
    EXPECT_GT(gap.logits, 1e-3);  // it did run in FP8
  }
}

}  // namespace
}  // namespace lockstep::model

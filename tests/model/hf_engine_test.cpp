// The engine in BF16 and in FP8 against the double-precision reference on the Hugging Face
// checkpoint.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "model/engine_run.h"
#include "model/hf_golden.h"
#include "ops/reference/router.h"

namespace lockstep::model {
namespace {

struct HfEngine : testing::TestWithParam<const char*> {
  HfGolden golden = load_hf_golden(GetParam());
  ReferenceModel reference = reference_model(golden.weights);
};
INSTANTIATE_TEST_SUITE_P(Families, HfEngine, testing::ValuesIn(kGoldenFolders),
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

// The choice of one token's router in the reference, and how far an engine's other choice may be
// off.
struct Choice {
  const ReferenceModel& reference;
  const ReferenceLayer& layer;
  std::size_t index;  // of the layer
  std::int64_t token;
  double noise;

  const ModelConfig& c = reference.config;
  const double* z = layer.router_logits.row(token);
  std::vector<double> bias = reference.router_bias[index];
  std::vector<int> own = ops::reference::router({z, z + c.num_experts}, bias, c.router).experts;
  const int* chosen = layer.experts.data() + token * c.router.top_k;

  bool sigmoid() const { return c.router.score == ops::RouterScore::kSigmoid; }
  int group(int e) const { return e / static_cast<int>(c.num_experts / c.router.groups); }
  // What experts are chosen by, and how much of it the noise of the hidden state can make; softmax
  // keeps the order of its logits (without a bias), sigmoid has slopes of at most 1/4.
  double value(int e) const { return sigmoid() ? layer.scores.row(token)[e] + bias[e] : z[e]; }
  double bound(int e) const {
    const ReferenceMatrix& w =
        reference.params.at(router_name(c, static_cast<std::int64_t>(index)));
    const double h = norm(layer.h2.row(token), layer.h2.columns) /
                     std::sqrt(static_cast<double>(layer.h2.columns));
    return 6 * noise * h * norm(w.row(e), w.columns) / (sigmoid() ? 4 : 1);
  }
  // Of a group: its two best values.
  std::pair<double, double> group_value(int g) const {
    const int size = static_cast<int>(c.num_experts / c.router.groups);
    std::vector<double> values;
    double limit = 0;
    for (int e = g * size; e < (g + 1) * size; ++e)
      values.push_back(value(e)), limit = std::max(limit, bound(e));
    std::sort(values.rbegin(), values.rend());
    return {values[0] + (size > 1 ? values[1] : 0), 2 * limit};
  }

  // Largest distance between an expert that the reference takes and one that the engine took in its
  // stead; 0 where they agree. Each must be a near-tie: of the two, or of their groups.
  double flip() const {
    double widest = 0;
    for (const int e : own) {
      if (std::count(chosen, chosen + c.router.top_k, e)) continue;
      for (int i = 0; i < c.router.top_k; ++i) {
        if (std::count(own.begin(), own.end(), chosen[i])) continue;
        double distance = value(e) - value(chosen[i]), limit = bound(e) + bound(chosen[i]);
        if (group(e) != group(chosen[i]) && (distance < 0 || distance > limit)) {
          const auto a = group_value(group(e)), b = group_value(group(chosen[i]));
          distance = a.first - b.first, limit = a.second + b.second;
        }
        EXPECT_LE(distance, limit) << "token " << token << " layer " << index << ": not a near-tie";
        widest = std::max(widest, std::max(distance, 1e-300));
      }
    }
    return widest;
  }
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
        const double limit = bound(pass.hidden, t, reference.params.at(golden_head(golden)).row(v));
        EXPECT_LE(error, limit) << "token " << first + t << " logit " << v;
        gap.logits = std::max(gap.logits, error);
        gap.bound_used = std::max(gap.bound_used, error / limit);
      }
      for (std::size_t l = 0; l < pass.layers.size(); ++l) {
        if (pass.layers[l].experts.empty()) continue;  // dense
        const double distance = Choice{reference, pass.layers[l], l, t, noise}.flip();
        gap.widest_flip = std::max(gap.widest_flip, distance);
        gap.flips += distance > 0;
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
// Latent attention has five more: both latent vectors, the queries out of theirs and in the space
// of the other, the heads' values.
double bf16_roundings(const HfGolden& golden) {
  return 2 * (is_latent(golden.weights.config) ? 18 : 13) + 1;
}
// Linears of a layer in a chain: q|k|v (and out of the queries' latent), o, gate|up, down.
double linears(const HfGolden& golden) { return golden.weights.config.latent.q_rank > 0 ? 5 : 4; }

TEST_P(HfEngine, bf16_logits_are_within_the_rounding_bound) {
  const double noise = rounding_noise(8, bf16_roundings(golden));
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
    const auto V = static_cast<std::size_t>(golden.weights.config.vocab_size);
    const std::int64_t D = golden.weights.config.hidden_size;
    const float* z = run.logits_TV.data() + run.logits_TV.size() - V;
    const auto best = static_cast<std::int32_t>(std::max_element(z, z + V) - z);
    const ReferencePass pass = reference_forward(reference, tokens, &run.routing);
    const double* r = pass.logits.row(pass.logits.rows - 1);
    const double h =
        norm(pass.hidden.row(pass.hidden.rows - 1), D) / std::sqrt(static_cast<double>(D));
    const auto top = std::max_element(r, r + V) - r;
    if (best != top) {
      ++differ;
      const ReferenceMatrix& w = reference.params.at(golden_head(golden));
      EXPECT_LE(r[top] - r[best], 6 * rounding_noise(8, bf16_roundings(golden)) * h *
                                      (norm(w.row(top), D) + norm(w.row(best), D)))
          << "position " << i << " is not a near-tie";
    }
    tokens.push_back(golden.greedy[i]);  // stay on PyTorch's path
  }
  std::printf("greedy: %d of 24 differ from the reference\n", differ);
}

// Each of the linears of a layer rounds both operands to four significant bits (E4M3).
TEST_P(HfEngine, fp8_logits_are_within_the_quantization_bound) {
  for (const Recipe recipe : {Recipe::kBlockwise, Recipe::kRowwise, Recipe::kTensorwise}) {
    Precision precision;
    precision.fp8 = true;
    precision.recipe = recipe;
    const double noise = std::hypot(rounding_noise(4, 2 * linears(golden) * 2),
                                    rounding_noise(8, bf16_roundings(golden)));
    const EngineRun run = run_engine(golden.weights, precision, golden.sequences);
    const Gap gap = compare(golden, reference, run, noise);
    const char* names[] = {"fp8 blockwise", "fp8 rowwise", "fp8 tensorwise"};
    print(names[static_cast<int>(recipe)], gap);
    EXPECT_GT(gap.logits, 1e-3);  // it did run in FP8
  }
}

}  // namespace
}  // namespace lockstep::model

// The engine's logits of a golden checkpoint against the double-precision reference and against
// PyTorch, and whether each expert that the two chose differently was a near-tie.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "model/engine_run.h"
#include "model/hf_golden.h"
#include "ops/reference/router.h"

namespace lockstep::model {

// A value rounded to p significant bits errs by a uniform relative error of at most 2^-p, so of
// standard deviation 2^-p / sqrt(3) at most. `roundings` of them in a chain add as variances.
inline double rounding_noise(int bits, double roundings) {
  return std::ldexp(1.0, -bits) * std::sqrt(roundings / 3);
}

// BF16 roundings from the embedding to the final norm's output: per layer h, q|k|v, rotated heads,
// p, attention, o, residual, h, gate|up, activation, down, combined, residual; then the final norm.
// Latent attention has five more: both latent vectors, the queries out of theirs and in the space
// of the other, the heads' values.
inline double bf16_noise(const ModelConfig& c) {
  return rounding_noise(8, (is_latent(c) ? 18 : 13) * static_cast<double>(c.num_layers) + 1);
}

// Each of the four linears of a layer (five where queries have a latent) rounds both operands to
// four significant bits (E4M3).
inline double fp8_noise(const ModelConfig& c) {
  const int linears = c.latent.q_rank > 0 ? 5 : 4;
  return std::hypot(rounding_noise(4, 2 * linears * static_cast<double>(c.num_layers)),
                    bf16_noise(c));
}

inline double vector_norm(const double* x, std::int64_t n) {
  double s = 0;
  for (std::int64_t i = 0; i < n; ++i) s += x[i] * x[i];
  return std::sqrt(s);
}

inline const ReferenceMatrix& head_of(const ReferenceModel& model) {
  return model.params.at(model.config.tie_word_embeddings ? "model.embed_tokens.weight"
                                                          : "lm_head.weight");
}

// `noise` is the standard deviation of the relative error of a hidden state's element; a dot
// product with w then errs by noise * rms(h) * |w|, and six times that bounds every logit of the
// model and of the routers.
inline double logit_bound(double noise, const ReferenceMatrix& h, std::int64_t t, const double* w) {
  return 6 * noise * vector_norm(h.row(t), h.columns) / std::sqrt(static_cast<double>(h.columns)) *
         vector_norm(w, h.columns);
}

struct Flip {
  std::int64_t row;  // of all sequences' tokens
  std::int64_t layer;
  double distance, bound;  // the widest of its experts, of selection_value
};

// One token's router in the reference. What it sorts by, as far as a common factor or summand of
// all experts is free: the logits of a softmax router, the scores and the bias of a sigmoid one,
// whose slope is at most 1/4.
struct GoldenChoice {
  const ReferenceModel& model;
  const ReferenceLayer& layer;
  std::size_t index;  // of the layer
  std::int64_t token;
  double noise;

  const ModelConfig& c = model.config;
  const double* z = layer.router_logits.row(token);
  std::vector<double> bias = model.router_bias[index];

  bool sigmoid() const { return c.router.score == ops::RouterScore::kSigmoid; }
  double value(int e) const { return sigmoid() ? layer.scores.row(token)[e] + bias[e] : z[e]; }
  double bound(int e) const {
    const ReferenceMatrix& w = model.params.at(router_name(c, static_cast<std::int64_t>(index)));
    return logit_bound(noise, layer.h2, token, w.row(e)) * (sigmoid() ? 0.25 : 1.0);
  }
  int group(int e) const { return e / static_cast<int>(c.num_experts / c.router.groups); }
  // Of a group: the sum of its two best values, and its bound.
  std::pair<double, double> group_value(int g) const {
    const int size = static_cast<int>(c.num_experts / c.router.groups);
    std::vector<double> values;
    double limit = 0;
    for (int e = g * size; e < (g + 1) * size; ++e)
      values.push_back(value(e)), limit = std::max(limit, bound(e));
    std::sort(values.rbegin(), values.rend());
    return {values[0] + (size > 1 ? values[1] : 0), 2 * limit};
  }

  // The widest step from an expert that the reference takes to one that stands in its place in
  // `chosen`, of the two or of their groups; distance 0 where the sets are the same.
  Flip flip(const int* chosen, std::int64_t row) const {
    Flip widest{row, static_cast<std::int64_t>(index), 0, 0};
    const auto own = ops::reference::router({z, z + c.num_experts}, bias, c.router).experts;
    for (const int e : own) {
      if (std::count(chosen, chosen + c.router.top_k, e)) continue;
      for (const int* other = chosen; other < chosen + c.router.top_k; ++other) {
        if (std::count(own.begin(), own.end(), *other)) continue;
        Flip step{row, widest.layer, value(e) - value(*other), bound(e) + bound(*other)};
        if (group(e) != group(*other) && (step.distance < 0 || step.distance > step.bound)) {
          const auto a = group_value(group(e)), b = group_value(group(*other));
          step.distance = a.first - b.first, step.bound = a.second + b.second;
        }
        step.distance = std::max(step.distance, 1e-300);
        if (step.distance > widest.distance) widest = step;
      }
    }
    return widest;
  }
};

// Tokens whose router chose another set of experts in `run` than `pass` says it should have. The
// reference must have seen the same input: `pass` took run's routing in the layers before. Every
// expert that was passed over for a lesser one must be within the sum of both values' bounds, or
// its group within that of both groups'.
inline std::vector<Flip> flips_of(const ReferenceModel& model, const ReferencePass& pass,
                                  const EngineRun& run, std::int64_t first, double noise) {
  const ModelConfig& c = model.config;
  std::vector<Flip> out;
  for (std::size_t l = 0; l < pass.layers.size(); ++l)
    for (std::int64_t t = 0; t < pass.logits.rows; ++t) {
      if (is_dense(c, static_cast<std::int64_t>(l))) continue;
      const Flip flip = GoldenChoice{model, pass.layers[l], l, t, noise}.flip(
          run.routing[l].data() + (first + t) * c.router.top_k, first + t);
      if (flip.distance > 0) out.push_back(flip);
    }
  return out;
}

struct GoldenGap {
  std::int64_t rows = 0, choices = 0;  // tokens; of those times layers with a router
  std::vector<Flip> flips;             // against the reference on the engine's own path
  std::int64_t reached = 0;            // rows that a flip can have changed, against PyTorch
  double logits = 0, used = 0;         // largest error on the engine's path, largest share of bound
  double torch = 0, torch_used = 0;    // the same against PyTorch, rows that no flip reached
  double torch_reached = 0;            // largest error of the others

  std::string text() const {
    double widest = 0;
    for (const Flip& f : flips) widest = std::max(widest, f.distance / f.bound);
    return fmt::format(
        "{} of {} choices of experts flipped, each a near-tie (the widest {:.0f} % of its bound); "
        "logits within {:.3g} of the reference ({:.0f} % of the bound), within {:.3g} of PyTorch "
        "({:.0f} %) in the {} of {} rows that no flip reaches, {:.3g} in the others",
        flips.size(), choices, 100 * widest, logits, 100 * used, torch, 100 * torch_used,
        rows - reached, rows, torch_reached);
  }
};

// Checks, with gtest's expectations:
// - on the engine's path (the reference takes the experts that the engine took) every logit of
//   every row is within its bound, and every choice that the reference would have made otherwise
//   is a near-tie;
// - against PyTorch's logits_fp32 every row that no flip reaches is within the bound: a flip in
//   layer l at token t reaches t itself, and later tokens of its sequence where a layer follows l.
//   PyTorch computed with the rotary frequencies of golden_model(); what these change, by the
//   reference, is added to the bounds.
inline GoldenGap expect_golden_gap(const HfGolden& golden, const EngineRun& run, double noise) {
  GoldenGap gap;
  const ReferenceModel exact = reference_model(golden.weights), torch = golden_model(golden);
  const ModelConfig& c = exact.config;
  const ReferenceMatrix& head = head_of(exact);
  const auto torch_logits = golden_values(golden.reference, "logits_fp32");
  const std::int64_t V = c.vocab_size;
  for (std::int64_t l = 0; l < c.num_layers; ++l) gap.choices += is_dense(c, l) ? 0 : 1;
  std::int64_t first = 0;
  for (const auto& tokens : golden.sequences) {
    const ReferencePass path = reference_forward(exact, tokens, &run.routing, first);
    const ReferencePass own = reference_forward(torch, tokens);
    ReferenceRouting own_routing;
    for (const ReferenceLayer& layer : own.layers) own_routing.push_back(layer.experts);
    const ReferencePass shifted = reference_forward(exact, tokens, &own_routing);
    for (const Flip& flip : flips_of(exact, path, run, first, noise)) {
      EXPECT_LE(flip.distance, flip.bound)
          << "token " << flip.row << " layer " << flip.layer << ": not a near-tie";
      gap.flips.push_back(flip);
    }
    // Where the engine's experts are not those of PyTorch's path.
    std::vector<bool> reached(tokens.size(), false);
    for (std::int64_t l = 0; l < c.num_layers; ++l)
      for (std::size_t t = 0; t < tokens.size() && !is_dense(c, l); ++t) {
        const auto set = [&](const std::vector<int>& experts, std::size_t row) {
          const auto at = experts.begin() + static_cast<std::ptrdiff_t>(row) * c.router.top_k;
          return std::set<int>(at, at + c.router.top_k);
        };
        const auto layer = static_cast<std::size_t>(l);
        if (set(run.routing[layer], static_cast<std::size_t>(first) + t) ==
            set(own.layers[layer].experts, t))
          continue;
        for (std::size_t u = t; u < (l + 1 < c.num_layers ? tokens.size() : t + 1); ++u)
          reached[u] = true;
      }
    for (std::int64_t t = 0; t < path.logits.rows; ++t) {
      gap.reached += reached[static_cast<std::size_t>(t)] ? 1 : 0;
      for (std::int64_t v = 0; v < V; ++v) {
        const std::int64_t at = (first + t) * V + v;
        const auto found = static_cast<double>(run.logits_TV[static_cast<std::size_t>(at)]);
        const double bound = logit_bound(noise, path.hidden, t, head.row(v));
        const double error = std::fabs(found - path.logits.row(t)[v]);
        EXPECT_LE(error, bound) << "token " << first + t << " logit " << v;
        gap.logits = std::max(gap.logits, error), gap.used = std::max(gap.used, error / bound);
        const double other = std::fabs(found - torch_logits[static_cast<std::size_t>(at)]);
        if (reached[static_cast<std::size_t>(t)]) {
          gap.torch_reached = std::max(gap.torch_reached, other);
          continue;
        }
        const double torch_bound = logit_bound(noise, own.hidden, t, head.row(v)) + 1e-5 +
                                   std::fabs(own.logits.row(t)[v] - shifted.logits.row(t)[v]);
        EXPECT_LE(other, torch_bound)
            << "token " << first + t << " logit " << v << " against PyTorch";
        gap.torch = std::max(gap.torch, other);
        gap.torch_used = std::max(gap.torch_used, other / torch_bound);
      }
    }
    first += path.logits.rows;
  }
  gap.rows = first;
  gap.choices *= first;
  return gap;
}

}  // namespace lockstep::model

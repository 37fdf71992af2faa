// Every family through the policy: gradients against the double-precision reference, the dense MLP
// against the one expert that all tokens take, recomputation, and learning.
#include "model/families.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "model/engine_run.h"
#include "policy/tiny_model.h"
#include "sync/refit.h"

namespace lockstep::policy::test {
namespace {

using model::FamilyCase;
using model::ReferenceParams;

model::Precision precision_of(bool fp8) {
  model::Precision p;
  p.fp8 = fp8;
  return p;
}

std::string bytes(const tensor::TensorView& t) {
  return {static_cast<const char*>(t.data), t.bytes()};
}

std::vector<std::vector<std::int32_t>> tokens_of(
    const std::vector<data::TrainSequence>& sequences) {
  std::vector<std::vector<std::int32_t>> out;
  for (const auto& s : sequences) out.push_back(s.tokens);
  return out;
}

// Root mean square of relative rounding errors, two of BF16's in a row of 27 operations forward
// and twice as many backward, as in hf_golden_test.cpp.
TEST(Families, gradients_are_those_of_the_reference) {
  const auto sequences = random_sequences(4, 40);
  for (const FamilyCase& f : model::family_cases(tiny_config())) {
    SCOPED_TRACE(f.name);
    tensor::Arena arena;
    Policy p = make_policy(tensor::cpu_context(arena, 1), tiny_weights(1, f.config), {});
    const auto run = model::run_engine(*p.weights, {}, tokens_of(sequences));
    begin_step(p);
    accumulate(p, sequences, 1, {}, mean_loss(sequences, count_tokens(sequences)));
    ReferenceParams expected;
    const double loss =
        reference_loss(reference_model(*p.weights), tokens_of(sequences), &expected, &run.routing);
    EXPECT_LE(std::fabs(p.loss - loss), 2e-3 * loss);
    const ReferenceParams gradients = reference_params(*p.weights, p.grads);
    ASSERT_EQ(gradients.size(), expected.size());
    const double noise = 0x1p-8 * std::sqrt(3 * 27 / 3.0);
    // Values within the noise of a bound may lie on its other side, and lose or gain their whole
    // gradient: a share of 2 noise times the density of |x| there (at most 0.8 for a normal one).
    const double crossing = f.config.clip_qkv > 0 ? std::sqrt(2 * noise * 0.8) : 0;
    for (const auto& [name, gradient] : gradients) {
      double error = 0, size = 0;
      for (std::size_t i = 0; i < gradient.values.size(); ++i) {
        const double e = expected.at(name).values[i];
        error += (gradient.values[i] - e) * (gradient.values[i] - e), size += e * e;
      }
      EXPECT_GT(size, 0) << name;
      EXPECT_LE(std::sqrt(error / size), std::hypot(3 * noise, crossing)) << name;
    }
  }
}

// In double, apart from the engine: the reference's gradient is the slope of its loss.
TEST(Families, reference_gradient_is_the_slope_of_the_loss) {
  for (const FamilyCase& f : model::family_cases(tiny_config())) {
    const auto weights = tiny_weights(1, f.config);
    const model::ReferenceModel reference = reference_model(*weights);
    const auto tokens = tokens_of(random_sequences(1, 30));
    ReferenceParams gradients;
    reference_loss(reference, tokens, &gradients);
    model::ReferenceRouting routing;
    for (const auto& layer : reference_forward(reference, tokens[0]).layers)
      routing.push_back(layer.experts);
    model::ReferenceModel plus = reference, minus = reference;
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
    const double difference = (reference_loss(plus, tokens, nullptr, &routing) -
                               reference_loss(minus, tokens, nullptr, &routing)) /
                              (2 * h);
    EXPECT_LE(std::fabs(difference - slope), 1e-6 * std::fabs(slope) + 1e-7)
        << f.name << ": " << difference << " " << slope;
  }
}

// A dense MLP is the one expert of a router that has no choice: loss, log-probabilities and the
// gradients of all weights but the router's have the same values.
TEST(Families, dense_equals_one_expert) {
  model::ModelConfig dense = tiny_config(), one = tiny_config();
  dense.family = model::Family::kLlama;
  one.family = model::Family::kMixtral;
  dense.qk_norm = one.qk_norm = false;
  dense.num_experts = 0, dense.intermediate_size = one.moe_intermediate_size;
  dense.router.top_k = one.router.top_k = 1;
  one.num_experts = 1;
  const auto sequences = random_sequences(4, 150);
  for (const bool fp8 : {false, true}) {
    tensor::Arena arenas[2];
    Policy policies[2];
    Logprobs logprobs[2];
    const std::shared_ptr<model::Weights> weights[2] = {tiny_weights(1, dense),
                                                        tiny_weights(1, one)};
    for (std::size_t i = 0; i < weights[0]->table.params.size(); ++i) {
      const model::Param& param = weights[0]->table.params[i];
      for (std::size_t j = 0; j < weights[1]->table.params.size(); ++j)
        if (weights[1]->table.params[j].name == param.name)
          std::memcpy(weights[1]->view(static_cast<int>(j)).data,
                      weights[0]->view(static_cast<int>(i)).data,
                      weights[0]->view(static_cast<int>(i)).bytes());
    }
    for (int k = 0; k < 2; ++k) {
      PolicyOptions options;
      options.precision = precision_of(fp8);
      policies[k] = make_policy(tensor::cpu_context(arenas[k], 1), weights[k], options);
      begin_step(policies[k]);
      logprobs[k] =
          accumulate(policies[k], sequences, 1, {}, mean_loss(sequences, count_tokens(sequences)));
    }
    EXPECT_TRUE(logprobs[0] == logprobs[1]) << "fp8 " << fp8;
    const ReferenceParams a = reference_params(*weights[0], policies[0].grads),
                          b = reference_params(*weights[1], policies[1].grads);
    for (int l = 0; l < 2; ++l)
      for (const auto which :
           {model::Projection::kGate, model::Projection::kUp, model::Projection::kDown})
        EXPECT_EQ(a.at(model::mlp_name(dense, l, -1, which)).values,
                  b.at(model::mlp_name(one, l, 0, which)).values);
    for (const auto& [name, gradient] : a) {
      if (!b.count(name)) continue;
      EXPECT_EQ(gradient.values, b.at(name).values) << name;
    }
    for (const double x : b.at(model::router_name(one, 0)).values) EXPECT_EQ(x, 0);
  }
}

TEST(Families, learn_and_recompute_to_the_same_bits_in_fp8) {
  const auto sequences = random_sequences(5, 40);
  for (const FamilyCase& f : model::family_cases(tiny_config())) {
    SCOPED_TRACE(f.name);
    std::string masters[2];
    for (const bool recompute : {false, true}) {
      tensor::Arena arena;
      PolicyOptions options;
      options.precision = precision_of(true);
      options.aux_loss_coeff = 0.01;
      options.bias_update_rate = 0.001;
      options.activation_checkpointing = recompute;
      Policy p = make_policy(tensor::cpu_context(arena, 1), tiny_weights(1, f.config), options);
      double first = 0;
      StepResult r;
      for (int step = 0; step < 8; ++step) {
        begin_step(p);
        accumulate(p, sequences, 1, {}, mean_loss(sequences, count_tokens(sequences)));
        r = finish_step(p, 3e-3);
        ASSERT_FALSE(r.skipped) << r.skip_reason;
        if (step == 0) first = r.loss;
      }
      EXPECT_LT(r.loss, 0.9 * first);
      EXPECT_GT(r.metrics.at("fp8/forward/expert_activation/amax_max"), 0);
      const bool routers = f.config.num_experts > 0;
      EXPECT_EQ(r.aux_loss > 0, routers);
      EXPECT_EQ(r.metrics.at("moe/max_load_over_mean") > 0, routers);
      masters[recompute] = bytes(p.master) + sync::weight_checksum(p.view());
    }
    EXPECT_TRUE(masters[0] == masters[1]);
  }
}

}  // namespace
}  // namespace lockstep::policy::test

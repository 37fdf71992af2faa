#include "policy/policy.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <stdexcept>

#include "policy/tiny_model.h"
#include "sync/refit.h"
#include "tensor/device.h"

namespace lockstep::policy::test {
namespace {

using tensor::Arena;
using tensor::TensorView;

model::Precision fp8(model::Recipe recipe = model::Recipe::kBlockwise) {
  model::Precision p;
  p.fp8 = true;
  p.recipe = recipe;
  return p;
}

std::string bytes(const TensorView& t) { return {static_cast<const char*>(t.data), t.bytes()}; }

// Trains `steps` steps on the same sequences; returns the losses.
std::vector<double> train(Policy& p, std::span<const data::TrainSequence> sequences, int steps,
                          std::size_t micro, double lr = 3e-3) {
  std::vector<double> losses;
  const double total = count_tokens(sequences);
  for (int i = 0; i < steps; ++i) {
    begin_step(p);
    for (std::size_t b = 0; b < sequences.size(); b += micro) {
      const auto part = sequences.subspan(b, std::min(micro, sequences.size() - b));
      accumulate(p, part, static_cast<double>(part.size()) / static_cast<double>(sequences.size()),
                 {}, mean_loss(part, total));
    }
    losses.push_back(finish_step(p, lr).loss);
  }
  return losses;
}

TEST(Policy, LearnsInEveryPrecision) {
  const auto sequences = random_sequences(6, 20);
  std::vector<model::Precision> all = {
      {}, fp8(), fp8(model::Recipe::kRowwise), fp8(model::Recipe::kTensorwise), fp8(), fp8()};
  all[4].weight_pow2 = all[4].activation_pow2 = true;
  all[5].num_first_layers_in_bf16 = 1;
  std::vector<double> last;
  double first = 0;
  for (const model::Precision& precision : all) {
    Arena arena;
    PolicyOptions options;
    options.precision = precision;
    Policy p = make_policy(tensor::cpu_context(arena, 1), tiny_weights(), options);
    const auto losses = train(p, sequences, 12, 6);
    EXPECT_LT(losses.back(), 0.8 * losses.front());
    last.push_back(losses.back());
    first = losses.front();
  }
  // FP8 follows BF16: the curves end close to each other, and none is the other's copy.
  for (std::size_t i = 1; i < last.size(); ++i) {
    EXPECT_NEAR(last[i], last[0], 0.05 * first) << i;
    EXPECT_NE(last[i], last[0]) << i;
  }
}

TEST(Policy, RecomputeThreadsAndIsaGiveTheSameBits) {
  const auto sequences = random_sequences(5, 40);
  std::string want_grads, want_master;
  for (int variant = 0; variant < 5; ++variant) {
    Arena arena;
    PolicyOptions options;
    options.precision = fp8();
    options.activation_checkpointing = variant == 1;
    options.aux_loss_coeff = 0.01;
    tensor::Context ctx = tensor::cpu_context(arena, variant == 2 ? 2 : 1);
    if (variant >= 3) ctx.isa = variant == 3 ? tensor::Isa::kAvx2 : tensor::Isa::kPortable;
    if (!tensor::isa_supported(ctx.isa)) continue;
    Policy p = make_policy(ctx, tiny_weights(), options);
    train(p, sequences, 2, 2);
    if (variant == 0) want_grads = bytes(p.grads), want_master = bytes(p.master);
    EXPECT_EQ(bytes(p.grads), want_grads) << variant;
    EXPECT_EQ(bytes(p.master), want_master) << variant;
  }
}

// A step's first micro-batch writes gradients over what the last step left. They have the bits of
// adding to zeros, and nothing of what was there before is read.
TEST(Policy, FirstMicroBatchWritesWhatAddingToZerosGives) {
  const auto many = random_sequences(6, 40);
  auto untrained = random_sequences(2, 20, 8);
  for (data::TrainSequence& s : untrained) s.loss_mask.assign(s.tokens.size(), 0.0f);
  // (One token: most experts have none.)
  const std::vector<data::TrainSequence> batches[] = {random_sequences(1, 2), many, untrained};
  for (const model::FamilyCase& f : model::family_cases(tiny_config()))
    for (const model::Precision& precision :
         {model::Precision{}, fp8(), fp8(model::Recipe::kRowwise)}) {
      Arena arena;
      PolicyOptions options;
      options.precision = precision;
      options.aux_loss_coeff = 0.01;
      Policy p = make_policy(tensor::cpu_context(arena, 1), tiny_weights(1, f.config), options);
      const auto gradients = [&](int micro_batches, int first, bool add) {
        begin_step(p);
        tensor::fill_bytes(p.ctx, p.grads, add ? 0 : 0xFF);
        p.accumulated = add;
        for (int i = 0; i < micro_batches; ++i) {
          const auto& batch = batches[(first + i) % 3];
          accumulate(p, batch, 0.5, {}, mean_loss(batch, 10));
        }
        return bytes(p.grads);
      };
      for (const auto& [micro_batches, first] : {std::pair{1, 0}, {1, 1}, {2, 2}, {3, 0}})
        EXPECT_TRUE(gradients(micro_batches, first, false) == gradients(micro_batches, first, true))
            << f.name << ", fp8 " << precision.fp8 << ", " << micro_batches
            << " micro-batches from " << first;
    }
}

TEST(Policy, StepsAfterSkippedAndEmptyOnesStartAfresh) {
  const auto sequences = random_sequences(3, 20);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const auto failing = [](const Logprobs&, Logprobs&) -> double { throw std::runtime_error("no"); };
  std::string want;
  for (const bool disturbed : {false, true}) {
    Arena arena;
    PolicyOptions options;
    options.precision = fp8();
    Policy p = make_policy(tensor::cpu_context(arena, 1), tiny_weights(), options);
    begin_step(p);
    if (disturbed) {
      accumulate(p, sequences, 1, {}, [&](const Logprobs&, Logprobs& d) {
        d[0][1] = static_cast<float>(nan);
        return nan;
      });
      EXPECT_TRUE(finish_step(p, 1e-3).skipped);
      begin_step(p);
      EXPECT_EQ(finish_step(p, 0).grad_norm, 0);  // no micro-batch
      begin_step(p);
      EXPECT_THROW(accumulate(p, sequences, 1, {}, failing), std::runtime_error);
    }
    accumulate(p, sequences, 1, {}, mean_loss(sequences, 10));
    if (!disturbed) want = bytes(p.grads);
    EXPECT_TRUE(bytes(p.grads) == want);
  }
}

TEST(Policy, ScoringTakesNoMoreMemoryForMoreLayers) {
  const auto sequences = random_sequences(5, 40);
  std::size_t peaks[2];
  for (const int layers : {2, 9}) {
    model::ModelConfig config = tiny_config();
    config.num_layers = layers;
    auto weights = std::make_shared<model::Weights>(model::make_weights(config));
    model::initialize(*weights, 1);
    Arena quantizing, arena;
    Policy p = make_policy(tensor::cpu_context(quantizing, 1), weights, {});
    score(tensor::cpu_context(arena, 1), p.view(), sequences, {});
    peaks[layers == 9] = arena.peak_bytes();
  }
  EXPECT_EQ(peaks[0], peaks[1]);
}

TEST(Policy, LogprobsDoNotDependOnThePack) {
  const auto sequences = random_sequences(9, 60);
  for (const auto& precision : {model::Precision{}, fp8(), fp8(model::Recipe::kTensorwise)}) {
    Arena arena;
    PolicyOptions options;
    options.precision = precision;
    Policy p = make_policy(tensor::cpu_context(arena, 1), tiny_weights(), options);
    const Logprobs together = score(p.ctx, p.view(), sequences, {});
    for (std::size_t s = 0; s < sequences.size(); ++s) {
      const Logprobs alone = score(p.ctx, p.view(), {&sequences[s], 1}, {});
      ASSERT_EQ(alone[0].size(), together[s].size());
      EXPECT_EQ(std::memcmp(alone[0].data(), together[s].data(), alone[0].size() * sizeof(float)),
                0)
          << s;
    }
    begin_step(p);
    const Logprobs trained = accumulate(p, std::span(sequences).subspan(3, 4), 1, {},
                                        mean_loss(std::span(sequences).subspan(3, 4), 1));
    for (std::size_t s = 0; s < 4; ++s)
      EXPECT_EQ(
          std::memcmp(trained[s].data(), together[3 + s].data(), trained[s].size() * sizeof(float)),
          0);
  }
}

TEST(Policy, NonFiniteStepsChangeNothingAndRunOutOfBudget) {
  Arena arena;
  PolicyOptions options;
  options.precision = fp8();
  options.guard = {false, 2, 10};
  Policy p = make_policy(tensor::cpu_context(arena, 1), tiny_weights(), options);
  const auto sequences = random_sequences(2, 10);
  const std::string weights = bytes(p.weights->slab), master = bytes(p.master),
                    checksum = sync::weight_checksum(p.view());
  const auto poison = [&](double loss, float slope) {
    begin_step(p);
    accumulate(p, sequences, 1, {}, [&](const Logprobs&, Logprobs& d) {
      d[0][1] = slope;
      return loss;
    });
    return finish_step(p, 1e-3);
  };
  EXPECT_TRUE(poison(std::numeric_limits<double>::quiet_NaN(), 0).skipped);
  EXPECT_TRUE(poison(1.0, std::numeric_limits<float>::quiet_NaN()).skipped);
  EXPECT_EQ(p.optimizer_step, 0);
  EXPECT_THROW(poison(std::numeric_limits<double>::infinity(), 0), base::SystemError);
  EXPECT_EQ(bytes(p.weights->slab), weights);
  EXPECT_EQ(bytes(p.master), master);
  EXPECT_EQ(sync::weight_checksum(p.view()), checksum);
  p.options.guard.abort = true;
  p.skipped_consecutive = p.skipped_total = 0;
  EXPECT_THROW(poison(std::numeric_limits<double>::quiet_NaN(), 0), base::SystemError);
  p.options.guard.abort = false;
  const auto healthy = train(p, sequences, 1, 2);
  EXPECT_TRUE(std::isfinite(healthy[0]));
  EXPECT_EQ(p.skipped_consecutive, 0);
  EXPECT_NE(sync::weight_checksum(p.view()), checksum);
}

TEST(Policy, PaddingStaysZero) {
  Arena arena;
  PolicyOptions options;
  options.precision = fp8();
  Policy p = make_policy(tensor::cpu_context(arena, 1), tiny_weights(), options);
  train(p, random_sequences(4, 20), 3, 2);
  const model::Param& gate_up = p.weights->table.params[p.weights->table.layers[1].gate_up];
  const TensorView w = p.weights->view(p.weights->table.layers[1].gate_up);
  const std::int64_t N = gate_up.shape[1], K = gate_up.shape[2],
                     F = p.weights->config.moe_intermediate_size;
  std::int64_t nonzero_padding = 0, nonzero = 0;
  for (std::int64_t e = 0; e < gate_up.shape[0]; ++e)
    for (std::int64_t n = 0; n < N; ++n)
      for (std::int64_t k = 0; k < K; ++k) {
        const bool set = w.as<numerics::Bf16>()[(e * N + n) * K + k].bits != 0;
        (n % (N / 2) < F ? nonzero : nonzero_padding) += set;
      }
  EXPECT_EQ(nonzero_padding, 0);
  EXPECT_GT(nonzero, 0);
}

TEST(Policy, BalancingActsOnTheLoad) {
  const auto sequences = random_sequences(8, 30);
  const auto final_load = [&](double aux, double rate) {
    Arena arena;
    PolicyOptions options;
    options.aux_loss_coeff = aux;
    options.bias_update_rate = rate;
    auto weights = tiny_weights();
    // A router that prefers expert 0.
    const TensorView router = weights->view(weights->table.layers[0].router);
    for (std::int64_t k = 0; k < 64; ++k)
      router.as<numerics::Bf16>()[k] = numerics::to_bf16(0.3f * static_cast<float>(k % 7 - 2));
    Policy p = make_policy(tensor::cpu_context(arena, 1), weights, options);
    StepResult r;
    for (int i = 0; i < 15; ++i) {
      begin_step(p);
      accumulate(p, sequences, 1, {}, [](const Logprobs&, Logprobs&) { return 0.0; });
      r = finish_step(p, 1e-2);
    }
    return r.metrics.at("moe/max_load_over_mean");
  };
  const double alone = final_load(0, 0);
  EXPECT_LT(final_load(0.1, 0), alone);
  EXPECT_LT(final_load(0, 0.05), alone);
}

TEST(Policy, PackingRefusesWhatDoesNotFit) {
  Arena arena;
  Policy p = make_policy(tensor::cpu_context(arena, 1), tiny_weights(), {});
  std::vector<data::TrainSequence> one(1);
  one[0].tokens = {5};
  one[0].loss_mask = {1};
  EXPECT_THROW(score(p.ctx, p.view(), one, {}), base::InputError);
  one[0].tokens.assign(300, 1);
  one[0].loss_mask.assign(300, 1);
  EXPECT_THROW(score(p.ctx, p.view(), one, {}), base::InputError);
  one[0].tokens = {5, 1000};
  one[0].loss_mask = {0, 1};
  EXPECT_THROW(score(p.ctx, p.view(), one, {}), base::ContractError);
}

}  // namespace
}  // namespace lockstep::policy::test

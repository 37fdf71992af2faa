// Training in BF16 against the double-precision reference on the Hugging Face checkpoint: loss,
// every gradient, ten AdamW steps.
#include "model/hf_golden.h"

#include <gtest/gtest.h>

#include <cmath>

#include "model/engine_run.h"
#include "policy/policy.h"
#include "policy/tiny_model.h"

namespace lockstep::policy::test {
namespace {

using model::HfGolden;
using model::ReferenceParams;

std::vector<data::TrainSequence> train_sequences(const HfGolden& golden) {
  std::vector<data::TrainSequence> out;
  for (const auto& tokens : golden.sequences) {
    data::TrainSequence s;
    s.tokens = tokens;
    s.loss_mask.assign(tokens.size(), 1.0f);
    s.loss_mask[0] = 0;
    out.push_back(s);
  }
  return out;
}

struct HfPolicy : testing::Test {
  HfGolden golden;
  std::vector<data::TrainSequence> sequences;
  tensor::Arena arena;
  PolicyOptions options;
  Policy policy;

  void make(bool fp8) {
    golden = model::load_hf_golden("qwen3_moe");  // copies of weights share their memory
    options.precision.fp8 = fp8;
    sequences = train_sequences(golden);
    options.max_grad_norm = 0;  // no clipping, as in PyTorch's run
    policy = make_policy(tensor::cpu_context(arena, 1),
                         std::make_shared<model::Weights>(golden.weights), options);
  }
  void accumulate_all() {
    begin_step(policy);
    accumulate(policy, sequences, 1, {}, mean_loss(sequences, count_tokens(sequences)));
  }
};

// Relative error of each tensor's gradient, in the Frobenius norm. A BF16 rounding has a standard
// deviation of at most 2^-8 / sqrt(3); a gradient passes about 27 of them in the forward and twice
// as many in the backward. The factor three is for tensors whose terms cancel.
TEST_F(HfPolicy, loss_and_every_gradient) {
  make(false);
  // The routing of the packed forward; it does not depend on the pack.
  const auto run = model::run_engine(*policy.weights, {}, golden.sequences);
  accumulate_all();
  ReferenceParams expected;
  const double loss =
      reference_loss(reference_model(golden.weights), golden.sequences, &expected, &run.routing);
  EXPECT_LE(std::fabs(policy.loss - loss), 2e-3 * loss);
  const ReferenceParams gradients = reference_params(*policy.weights, policy.grads);
  ASSERT_EQ(gradients.size(), expected.size());
  const double bound = 3 * 0x1p-8 * std::sqrt(3 * 27 / 3.0);
  double worst = 0;
  std::string where;
  for (const auto& [name, gradient] : gradients) {
    double error = 0, size = 0;
    for (std::size_t i = 0; i < gradient.values.size(); ++i) {
      const double e = expected.at(name).values[i];
      error += (gradient.values[i] - e) * (gradient.values[i] - e), size += e * e;
    }
    const double relative = std::sqrt(error / size);
    EXPECT_LE(relative, bound) << name;
    if (!(relative <= worst)) worst = relative, where = name;
  }
  std::printf("loss %.6f (reference %.6f); worst gradient %.3g of its norm (%s), bound %.3g\n",
              policy.loss, loss, worst, where.c_str(), bound);
}

TEST_F(HfPolicy, ten_adamw_losses) {
  for (const bool fp8 : {false, true}) {
    make(fp8);
    model::ReferenceModel reference = reference_model(golden.weights);
    model::ReferenceAdamw state;
    for (int step = 0; step < 10; ++step) {
      accumulate_all();
      const double loss = finish_step(policy, 1e-3).loss;
      ReferenceParams gradients;
      const double expected = reference_loss(reference, golden.sequences, &gradients);
      reference_adamw(state, gradients, reference.params);
      std::printf("%s step %d: loss %.5f, reference %.5f (%+.2f %%)\n", fp8 ? "fp8" : "bf16", step,
                  loss, expected, 100 * (loss / expected - 1));
    }
  }
}

}  // namespace
}  // namespace lockstep::policy::test

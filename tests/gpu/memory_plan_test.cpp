// The memory plan: steps that are no larger than the planned one take no memory from the GPU.
#include "policy/memory_plan.h"

#include "gpu/gpu_test.h"
#include "policy/tiny_model.h"

namespace lockstep::policy::test {
namespace {

using MemoryPlanGpu = ops::test::GpuTest;

// Large enough that an arena's first pieces (64 MiB) are not all that is taken.
model::ModelConfig wide_config() {
  model::ModelConfig c = tiny_config();
  c.vocab_size = 16384;
  c.hidden_size = 1024;
  c.moe_intermediate_size = 512;
  return c;
}

TEST_F(MemoryPlanGpu, StepsTakeNothingBeyondIt) {
  constexpr std::int64_t kSequences = 40, kLength = 151;
  for (const bool fp8 : {false, true})
    for (const bool checkpointing : {false, true}) {
      SCOPED_TRACE(fmt::format("fp8 {}, activation_checkpointing {}", fp8, checkpointing));
      tensor::Arena workspace(tensor::Device::kCuda);
      const tensor::Context ctx = tensor::cuda_context(workspace);
      auto weights = std::make_shared<model::Weights>(model::make_weights(wide_config()));
      model::initialize(*weights, 1);
      model::move_to(ctx, *weights);
      PolicyOptions options;
      options.precision.fp8 = fp8;
      options.activation_checkpointing = checkpointing;
      Policy p = make_policy(ctx, weights, options);
      const MemoryPlan plan = plan_memory(p, kSequences, kLength, kSequences + 7);
      const auto step = [&](std::int64_t sequences, std::int64_t length) {
        std::vector<data::TrainSequence> batch;
        for (std::int64_t s = 0; s < sequences; ++s) {
          data::TrainSequence sequence;
          for (std::int64_t t = 0; t < length; ++t)
            sequence.tokens.push_back(static_cast<std::int32_t>((s * 977 + t * 131) % 16384));
          sequence.loss_mask.assign(sequence.tokens.size(), 1.0f);
          sequence.loss_mask[0] = 0;
          batch.push_back(sequence);
        }
        begin_step(p);
        accumulate(p, batch, 1.0, {}, mean_loss(batch, count_tokens(batch)));
        finish_step(p, 1e-4);
        score(ctx, p.view(), batch, {});
      };
      step(3, 20);
      step(kSequences, kLength);
      step(kSequences - 1, kLength);
      EXPECT_LE(p.saved.peak_bytes(), plan.activations);
      EXPECT_LE(workspace.peak_bytes(), plan.workspace);
      EXPECT_GE(plan.activations, std::size_t{1} << 20);
      // A larger one shows.
      step(2 * kSequences, kLength);
      EXPECT_GT(p.saved.peak_bytes(), plan.activations);
    }
}

}  // namespace
}  // namespace lockstep::policy::test

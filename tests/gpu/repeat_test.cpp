// The policy's step at real width, run again and again: the same bits every time. What a race or
// memory that nobody wrote would change shows here, by parameter.
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "gpu/gpu_test.h"
#include "policy/tiny_model.h"

namespace lockstep::policy::test {
namespace {

using RepeatGpu = ops::test::GpuTest;

model::ModelConfig wide_config() {
  model::ModelConfig c = tiny_config();
  c.vocab_size = 4096;
  c.hidden_size = 2048;
  c.num_layers = 1;
  c.num_heads = 32;
  c.num_kv_heads = 4;
  c.head_dim = 128;
  c.max_positions = 2048;
  c.num_experts = 32;
  c.moe_intermediate_size = 768;
  c.router.top_k = 8;
  c.initializer_range = 0.02;
  return c;
}

std::uint64_t checksum(const tensor::TensorView& view) {
  XXH64_state_t* state = XXH64_createState();
  XXH64_reset(state, 0);
  tensor::read_pieces(view, [&](std::span<const std::byte> piece) {
    XXH64_update(state, piece.data(), piece.size());
  });
  const std::uint64_t sum = XXH64_digest(state);
  XXH64_freeState(state);
  return sum;
}

TEST_F(RepeatGpu, GradientsOfAWideModelAreTheSameEveryTime) {
  for (const bool fp8 : {true, false}) {
    auto weights = std::make_shared<model::Weights>(model::make_weights(wide_config()));
    model::initialize(*weights, 5);
    model::move_to(gpu, *weights);
    PolicyOptions options;
    options.precision.fp8 = fp8;
    Policy p = make_policy(gpu, weights, options);
    std::vector<data::TrainSequence> sequences = random_sequences(24, 900, 3);
    for (data::TrainSequence& s : sequences)
      for (std::size_t t = 0; t < s.tokens.size(); ++t)
        s.tokens[t] = static_cast<std::int32_t>(base::philox4x32(1, t, s.tokens[t]).word[0] % 4096);
    std::vector<std::uint64_t> first(weights->table.params.size());
    Logprobs logprobs;
    for (int run = 0; run < 8; ++run) {
      begin_step(p);
      // Other contents in what is not written.
      tensor::TensorView scratch = p.ctx.workspace->take(tensor::DType::kE4m3, {1 << 30});
      tensor::fill_bytes(gpu, scratch, run % 2 == 0 ? 0xFF : 0x3C);
      p.ctx.workspace->reset();
      const Logprobs now =
          accumulate(p, sequences, 1.0, {}, mean_loss(sequences, count_tokens(sequences)));
      if (run == 0) logprobs = now;
      EXPECT_TRUE(now == logprobs) << "log-probabilities, fp8 " << fp8 << " run " << run;
      for (std::size_t i = 0; i < first.size(); ++i) {
        const std::uint64_t sum =
            checksum(model::param_view(weights->table, p.grads, static_cast<int>(i)));
        if (run == 0) first[i] = sum;
        EXPECT_EQ(sum, first[i]) << "fp8 " << fp8 << " run " << run << " "
                                 << weights->table.params[i].parts[0].hf_name << " "
                                 << weights->table.params[i].shape.text();
      }
    }
  }
}

}  // namespace
}  // namespace lockstep::policy::test

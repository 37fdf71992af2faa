// Batch invariance at widths whose tiles are the fast ones (head width 128, long prompts): an
// answer is the policy's, whatever the batch, chunks, pages, preemption and graphs.
#include "gpu/gpu_test.h"
#include "policy/policy.h"
#include "rollout/engine.h"
#include "rollout/tiny_model.h"

namespace lockstep::rollout::test {
namespace {

model::ModelConfig wide_config() {
  model::ModelConfig c = tiny_config(2304);
  c.vocab_size = 1000;
  c.hidden_size = 512;
  c.num_heads = 8;
  c.num_kv_heads = 2;
  c.head_dim = 128;
  c.num_experts = 16;
  c.moe_intermediate_size = 256;
  c.router.top_k = 4;
  c.initializer_range = 0.05;
  return c;
}

// Four samples a prompt; some prompts around the tiles of attention, one beyond its splits.
std::vector<Request> wide_requests(int count) {
  constexpr int kLengths[] = {1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 300, 500, 2050};
  std::vector<Request> out;
  for (int i = 0; i < count; ++i) {
    const int prompt = i / 4;
    const int length = prompt < 15 ? kLengths[prompt] : 1 + prompt * 37 % 150;
    Request r = request(random_tokens(length, static_cast<std::uint64_t>(prompt)), 4 + i * 29 % 60);
    r.stream = request_stream(prompt, i % 4);
    r.prompt_id = prompt;
    r.sample = i % 4;
    if (i % 7 == 1) r.sampling.temperature = 0;
    if (i % 7 == 2) r.sampling.top_k = 20, r.sampling.top_p = 0.9f;
    if (i % 7 == 3) r.sampling.min_p = 0.01f, r.sampling.temperature = 1.3f;
    out.push_back(r);
  }
  return out;
}

using InvarianceGpu = ops::test::GpuTest;

TEST_F(InvarianceGpu, AnswersOfAWideModelAreThePolicysWhateverTheOptions) {
  constexpr int kRequests = 160;
  const std::vector<Request> requests = wide_requests(kRequests);
  for (const bool fp8 : {true, false}) {
    model::Weights weights = model::make_weights(wide_config());
    model::initialize(weights, 3);
    model::move_to(gpu, weights);
    model::Precision precision;
    precision.fp8 = fp8;
    const auto quantized = model::quantized_for(gpu, weights, precision);
    const model::RopeTables rope = model::make_rope_tables(gpu, weights.config);
    const model::ModelView view{&weights, quantized.get(), rope.cos_PK, rope.sin_PK};
    EngineStats stats;
    const auto generate = [&](const Options& options) {
      Engine engine(gpu, options, letters);
      engine.set_model(view, 1);
      auto answers = engine.generate(requests);
      stats = engine.stats();
      return answers;
    };
    Options one;
    one.max_num_seqs = 1;
    one.enforce_eager = true;
    const std::vector<data::Trajectory> expected = generate(one);
    ASSERT_EQ(expected.size(), requests.size());
    const auto expect_same = [&](const Options& options, const std::string& what) {
      const std::vector<data::Trajectory> found = generate(options);
      ASSERT_EQ(found.size(), expected.size()) << what;
      std::string different;
      for (std::size_t i = 0; i < found.size(); ++i)
        if (found[i].response != expected[i].response || found[i].logprobs != expected[i].logprobs)
          different += ' ' + std::to_string(i);
      EXPECT_EQ(different, "") << what << ", fp8 " << fp8;
    };
    for (const int batch : {1, 2, 31, 32, 33, 128, 512})
      for (const bool eager : {false, true}) {
        Options o;
        o.max_num_seqs = batch;
        o.enforce_eager = eager;
        o.shuffle_pages = static_cast<std::uint64_t>(batch);
        expect_same(o, fmt::format("batch {}, eager {}", batch, eager));
        EXPECT_EQ(stats.graph_steps == 0, eager);
      }
    std::int64_t preemptions = 0;
    for (const int chunk : {7, 48, 64, 130, 2000})
      for (const int page : {8, 64}) {
        Options o;
        o.prefill_chunk = chunk;
        o.block_size = page;
        o.max_num_batched_tokens = 700;
        o.enable_prefix_sharing = chunk % 2 == 0;
        o.num_blocks = 2560 / page;  // with small pages some are preempted
        o.shuffle_pages = 5;
        expect_same(o, fmt::format("chunks of {}, pages of {}", chunk, page));
        preemptions += stats.preemptions;
      }
    EXPECT_GT(preemptions, 0);

    // The policy's log-probabilities of the same answers, all sequences packed as in training.
    std::vector<data::TrainSequence> sequences;
    std::vector<const data::Trajectory*> plain;
    for (std::size_t i = 0; i < requests.size(); ++i) {
      if (i % 7 >= 1 && i % 7 <= 3) continue;  // drawn with filters or another temperature
      data::TrainSequence s;
      s.tokens = requests[i].prompt;
      s.tokens.insert(s.tokens.end(), expected[i].response.begin(), expected[i].response.end());
      s.loss_mask.assign(s.tokens.size(), 0.0f);
      for (std::size_t t = requests[i].prompt.size(); t < s.tokens.size(); ++t) s.loss_mask[t] = 1;
      sequences.push_back(std::move(s));
      plain.push_back(&expected[i]);
    }
    const policy::Logprobs logprobs = policy::score(gpu, view, sequences, {});
    std::int64_t different = 0, compared = 0;
    for (std::size_t i = 0; i < plain.size(); ++i) {
      const std::size_t prompt = sequences[i].tokens.size() - plain[i]->response.size();
      for (std::size_t t = 0; t < plain[i]->response.size(); ++t, ++compared)
        different += logprobs[i][prompt + t] != plain[i]->logprobs[t];
    }
    EXPECT_GT(compared, 500);
    EXPECT_EQ(different, 0) << "of " << compared << " log-probabilities of the policy, fp8 " << fp8;
  }
}

}  // namespace
}  // namespace lockstep::rollout::test

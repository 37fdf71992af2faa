// A request's tokens and log-probabilities are the same bytes whatever runs beside it and however
// the engine is set, and they are the ones that the policy computes.
#include <gtest/gtest.h>

#include <cmath>

#include "model/families.h"
#include "rollout/tiny_model.h"

namespace lockstep::rollout::test {
namespace {

using data::Trajectory;

struct Case {
  const char* name;
  model::Precision precision;
  model::ModelConfig config = tiny_config(128);
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

model::Precision fp8(model::Recipe recipe) {
  model::Precision p;
  p.fp8 = true;
  p.recipe = recipe;
  return p;
}

// Pages of latent vectors.
model::ModelConfig latent_config(std::int64_t max_positions) {
  for (const model::FamilyCase& f : model::family_cases(tiny_config(max_positions)))
    if (is_latent(f.config)) return f.config;
  return {};
}

std::vector<Trajectory> run(const TinyModel& m, const Options& options,
                            const std::vector<Request>& requests, EngineStats* stats = nullptr,
                            const tensor::Context* ctx = nullptr) {
  Engine engine(ctx != nullptr ? *ctx : m.ctx, options, letters);
  engine.set_model(m.view(), 3);
  std::vector<Trajectory> out = engine.generate(requests);
  if (stats != nullptr) *stats = engine.stats();
  return out;
}

void expect_same(const std::vector<Trajectory>& got, const std::vector<Trajectory>& want,
                 const std::string& what) {
  SCOPED_TRACE(what);
  ASSERT_LE(got.size(), want.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    ASSERT_EQ(got[i].response, want[i].response) << "request " << i;
    ASSERT_EQ(got[i].logprobs.size(), want[i].logprobs.size());
    ASSERT_EQ(std::memcmp(got[i].logprobs.data(), want[i].logprobs.data(),
                          want[i].logprobs.size() * sizeof(float)),
              0)
        << "log-probabilities of request " << i;
    ASSERT_EQ(got[i].finish, want[i].finish);
    ASSERT_EQ(got[i].text, want[i].text);
    ASSERT_EQ(got[i].prompt_id, want[i].prompt_id);
    ASSERT_EQ(got[i].sample, want[i].sample);
  }
}

// Quick to make.
Options small_cache() {
  Options o;
  o.max_num_seqs = 1;
  return o;
}

class Invariance : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    model_ = std::make_unique<TinyModel>(GetParam().precision, 1, GetParam().config);
    requests_ = mixed_requests(128);
    // One request at a time, each in an engine of its own.
    for (const Request& r : requests_) alone_.push_back(run(*model_, small_cache(), {r})[0]);
  }
  std::vector<Request> first(std::size_t n) const {
    return {requests_.begin(), requests_.begin() + static_cast<std::ptrdiff_t>(n)};
  }
  void expect_alone(const Options& options, std::size_t n, const std::string& what,
                    EngineStats* stats = nullptr) {
    expect_same(run(*model_, options, first(n), stats), alone_, what);
  }

  std::unique_ptr<TinyModel> model_;
  std::vector<Request> requests_;
  std::vector<Trajectory> alone_;
};

TEST_P(Invariance, EqualsThePolicy) {
  int ended_early = 0, tokens = 0;
  for (std::size_t i = 0; i < requests_.size(); ++i) {
    const Trajectory& t = alone_[i];
    std::vector<std::int32_t> drawn;
    const auto stats = policy_view(*model_, requests_[i], t.response, &drawn);
    EXPECT_EQ(drawn, t.response);
    ASSERT_EQ(t.logprobs.size(), t.response.size());
    for (std::size_t k = 0; k < stats.size(); ++k) {
      EXPECT_TRUE(std::isfinite(t.logprobs[k]) && t.logprobs[k] <= 0) << t.logprobs[k];
      EXPECT_EQ(std::memcmp(&stats[k].logprob, &t.logprobs[k], sizeof(float)), 0)
          << stats[k].logprob << " " << t.logprobs[k];
    }
    EXPECT_EQ(t.weight_version, 3u);
    EXPECT_EQ(t.prompt, requests_[i].prompt);
    ended_early += t.finish == data::FinishReason::kStop;
    tokens += static_cast<int>(t.response.size());
  }
  EXPECT_GT(ended_early, 10);
  EXPECT_GT(tokens, 300);
}

TEST(Families, EveryOneEqualsThePolicy) {
  const auto requests = mixed_requests(24);
  for (const model::FamilyCase& f : model::family_cases(tiny_config(128)))
    for (const bool quantized : {false, true}) {
      SCOPED_TRACE(fmt::format("{}, fp8 {}", f.name, quantized));
      const TinyModel m(quantized ? fp8(model::Recipe::kBlockwise) : model::Precision{}, 1,
                        f.config);
      Options o;
      o.block_size = 4;
      o.prefill_chunk = 5;
      const auto answers = run(m, o, requests);
      expect_same(run(m, small_cache(), requests), answers, "one at a time");
      for (std::size_t i = 0; i < requests.size(); ++i) {
        std::vector<std::int32_t> drawn;
        const auto stats = policy_view(m, requests[i], answers[i].response, &drawn);
        EXPECT_EQ(drawn, answers[i].response);
        for (std::size_t k = 0; k < stats.size(); ++k)
          EXPECT_EQ(std::memcmp(&stats[k].logprob, &answers[i].logprobs[k], sizeof(float)), 0);
      }
    }
}

TEST_P(Invariance, OverBatches) {
  for (const std::size_t n : {2, 31, 32, 33, 128}) {
    Options o;
    EngineStats stats;
    expect_alone(o, n, fmt::format("{} together", n), &stats);
    EXPECT_LE(stats.steps, 16);
    o.max_num_seqs = 5;
    if (n == 33) expect_alone(o, n, "33, five at a time");
  }
}

TEST_P(Invariance, OverChunksAndBudgets) {
  for (const int chunk : {1, 3, 16}) {
    Options o;
    o.prefill_chunk = chunk;
    expect_alone(o, 33, fmt::format("chunk {}", chunk));
  }
  for (const int budget : {1, 7, 40}) {
    Options o;
    o.max_num_batched_tokens = budget;
    expect_alone(o, 33, fmt::format("budget {}", budget));
  }
}

TEST_P(Invariance, OverPages) {
  for (const int block : {1, 3, 16, 64})
    for (const std::uint64_t shuffle : {0, 5}) {
      Options o;
      o.block_size = block;
      o.shuffle_pages = shuffle;
      expect_alone(o, 33, fmt::format("pages of {}, shuffle {}", block, shuffle));
    }
}

TEST_P(Invariance, OverPrefixSharing) {
  EngineStats with, without;
  Options o;
  o.block_size = 4;
  expect_alone(o, 64, "shared", &with);
  o.enable_prefix_sharing = false;
  expect_alone(o, 64, "not shared", &without);
  EXPECT_GT(with.shared_prefix_tokens, 200);
  EXPECT_GT(with.page_copies, 10);
  EXPECT_EQ(without.shared_prefix_tokens, 0);
  EXPECT_EQ(with.prefill_tokens + with.shared_prefix_tokens, without.prefill_tokens);
}

TEST_P(Invariance, AfterPreemption) {
  for (const int block : {1, 4}) {
    std::int64_t preemptions = 0;
    Options o;
    o.block_size = block;
    o.num_blocks = 36 / block;
    o.shuffle_pages = block;
    for (const int chunk : {0, 3}) {
      o.prefill_chunk = chunk;
      EngineStats stats;
      expect_alone(o, 64, fmt::format("36 tokens of cache, pages of {}", block), &stats);
      preemptions += stats.preemptions;
      EXPECT_LE(stats.peak_pages, o.num_blocks);
    }
    EXPECT_GT(preemptions, 0) << block;
  }
}

// Beyond one block of 128 keys.
class LongPrompts : public testing::TestWithParam<bool> {};

TEST_P(LongPrompts, OverChunksAndPages) {
  const TinyModel m(fp8(model::Recipe::kBlockwise), 1,
                    GetParam() ? latent_config(512) : tiny_config(512));
  std::vector<Request> requests;
  for (int i = 0; i < 4; ++i)
    requests.push_back(request(random_tokens(i < 2 ? 127 : 259, i / 2), 5, i));
  std::vector<Trajectory> alone;
  Options o;
  o.max_num_seqs = 4;
  for (const Request& r : requests) {
    alone.push_back(run(m, o, {r})[0]);
    std::vector<std::int32_t> drawn;
    const auto stats = policy_view(m, r, alone.back().response, &drawn);
    EXPECT_EQ(drawn, alone.back().response);
    for (std::size_t k = 0; k < stats.size(); ++k)
      EXPECT_EQ(stats[k].logprob, alone.back().logprobs[k]);
  }
  for (const int chunk : {0, 37, 128})
    for (const int block : {3, 64}) {
      o.prefill_chunk = chunk;
      o.block_size = block;
      o.shuffle_pages = 11;
      expect_same(run(m, o, requests), alone, fmt::format("chunk {}, pages of {}", chunk, block));
    }
}

TEST_P(Invariance, OverThreadsAndInstructionSets) {
  tensor::Context ctx = model_->ctx;
  ctx.threads = 2;
  expect_same(run(*model_, {}, first(8), nullptr, &ctx), alone_, "two threads");
  for (const tensor::Isa isa : {tensor::Isa::kPortable, tensor::Isa::kAvx2, tensor::Isa::kAvx512}) {
    if (!tensor::isa_supported(isa)) continue;
    ctx.isa = isa;
    ctx.threads = 1;
    expect_same(run(*model_, {}, first(33), nullptr, &ctx), alone_, tensor::isa_name(isa));
  }
}

INSTANTIATE_TEST_SUITE_P(
    Precisions, Invariance,
    testing::Values(Case{"Bf16", {}}, Case{"Fp8Blockwise", fp8(model::Recipe::kBlockwise)},
                    Case{"Fp8Rowwise", fp8(model::Recipe::kRowwise)},
                    Case{"LatentBf16", {}, latent_config(128)},
                    Case{"LatentFp8", fp8(model::Recipe::kBlockwise), latent_config(128)}),
    [](const auto& info) { return info.param.name; });
INSTANTIATE_TEST_SUITE_P(Attentions, LongPrompts, testing::Bool(),
                         [](const auto& info) { return info.param ? "Latent" : "Grouped"; });

// What a page costs: a latent vector and one rotated key a token and layer.
TEST(LatentPages, AreAsLargeAsTheLatentRows) {
  const TinyModel m({}, 1, latent_config(128));
  Options o;
  o.num_blocks = 10;
  o.block_size = 16;
  Engine engine(m.ctx, o, letters);
  engine.set_model(m.view(), 1);
  EXPECT_EQ(engine.cache_bytes(), 2u * 160 * (48 + 16) * 2);
}

}  // namespace
}  // namespace lockstep::rollout::test

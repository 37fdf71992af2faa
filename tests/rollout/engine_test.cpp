// The engine's edges: requests that end at once or are refused, endings, aborts, weights that
// change.
#include <gtest/gtest.h>

#include <cmath>

#include "rollout/tiny_model.h"

namespace lockstep::rollout::test {
namespace {

using base::InputError;
using data::FinishReason;
using data::Trajectory;

struct Fixture {
  explicit Fixture(Options options = {}) : model({}), engine(model.ctx, options, letters) {
    engine.set_model(model.view(), 1);
  }
  Trajectory one(const Request& r) { return engine.generate({r})[0]; }

  TinyModel model;
  Engine engine;
};

// The message of the InputError that `f` throws.
template <typename F>
std::string refusal(F f) {
  try {
    f();
  } catch (const InputError& e) {
    return e.what();
  }
  return "accepted";
}

TEST(Engine, RefusesRequestsThatCannotBe) {
  Options o;
  o.max_model_len = 20;
  o.block_size = 4;
  o.num_blocks = 4;
  Fixture f(o);
  const auto says = [&](const Request& r, const std::string& text) {
    const std::string message = refusal([&] { f.engine.submit(r); });
    EXPECT_NE(message.find(text), std::string::npos) << message;
  };
  says(request({}, 4), "empty");
  says(request(random_tokens(21, 1), 4), "21 tokens, but max_model_len is 20");
  says(request(random_tokens(10, 1), 10), "need 5 pages of 4 tokens, but num_blocks is 4");
  says(request({1, 67}, 4), "token 67 at position 1");
  says(request({1, -1}, 4), "token -1 at position 1");
  says(request({1}, -1), "max_new_tokens");
  Request r = request({1}, 4);
  r.sampling.temperature = -1;
  says(r, "temperature");
  r.sampling.temperature = std::nanf("");
  says(r, "temperature");
  r.sampling.temperature = 1e-40f;
  says(r, "temperature");
  r = request({1}, 4);
  r.sampling.top_p = 0;
  says(r, "top_p");
  r = request({1}, 4);
  r.sampling.min_p = 1.5f;
  says(r, "min_p");
  r = request({1}, 4);
  r.sampling.stop_strings = {""};
  says(r, "stop string");
  // One bad request refuses all of them.
  EXPECT_THROW(f.engine.generate({request({1}, 4), request({}, 4)}), InputError);
  EXPECT_EQ(f.engine.unfinished(), 0);
  EXPECT_FALSE(f.engine.step());
  EXPECT_EQ(f.one(request(random_tokens(10, 1), 7)).response.size(), 7u);
}

TEST(Engine, RefusesOptionsThatCannotBe) {
  TinyModel m({});
  Options o;
  o.block_size = 0;
  EXPECT_THROW(Engine(m.ctx, o, letters), InputError);
  o = {};
  o.max_num_batched_tokens = 0;
  EXPECT_THROW(Engine(m.ctx, o, letters), InputError);
  o = {};
  o.max_model_len = 129;
  Engine engine(m.ctx, o, letters);
  EXPECT_THROW(engine.set_model(m.view(), 1), InputError);
  Engine no_model(m.ctx, {}, letters);
  EXPECT_THROW(no_model.submit(request({1}, 1)), base::ContractError);
}

TEST(Engine, NoNewTokens) {
  Fixture f;
  const Trajectory t = f.one(request({1, 2}, 0));
  EXPECT_TRUE(t.response.empty() && t.logprobs.empty() && t.text.empty());
  EXPECT_EQ(t.finish, FinishReason::kLength);
  EXPECT_EQ(t.prompt.size(), 2u);
  EXPECT_EQ(f.engine.stats().steps, 0);
  EXPECT_TRUE(f.engine.generate({}).empty());
}

TEST(Engine, EndsAtMaxModelLen) {
  Options o;
  o.max_model_len = 10;
  Fixture f(o);
  EXPECT_EQ(f.one(request(random_tokens(7, 1), 50)).response.size(), 3u);
  EXPECT_EQ(f.one(request(random_tokens(10, 1), 50)).response.size(), 0u);
  EXPECT_EQ(f.one(request(random_tokens(9, 1), 50)).finish, FinishReason::kLength);
}

TEST(Engine, StopTokenIsInTheResponseButNotInTheText) {
  Fixture f;
  Request r = request(random_tokens(5, 3), 8);
  const Trajectory whole = f.one(r);
  ASSERT_EQ(whole.response.size(), 8u);
  r.sampling.stop_token_ids = {whole.response[4]};
  const auto at = std::find(whole.response.begin(), whole.response.end(), whole.response[4]) -
                  whole.response.begin();
  const Trajectory t = f.one(r);
  EXPECT_EQ(t.finish, FinishReason::kStop);
  ASSERT_EQ(t.response.size(), static_cast<std::size_t>(at + 1));
  EXPECT_EQ(t.logprobs.size(), t.response.size());
  EXPECT_EQ(t.text, whole.text.substr(0, at));
}

TEST(Engine, StopStringAcrossTokens) {
  Fixture f;
  Request r = request(random_tokens(5, 3), 8);
  const Trajectory whole = f.one(r);
  ASSERT_EQ(whole.text.size(), 8u);
  const std::string stop = whole.text.substr(3, 3);  // three tokens
  const auto at = whole.text.find(stop);
  r.sampling.stop_strings = {"never seen", stop};
  const Trajectory t = f.one(r);
  EXPECT_EQ(t.finish, FinishReason::kStop);
  EXPECT_EQ(t.response.size(), at + 3);
  EXPECT_EQ(t.text, whole.text.substr(0, at));
}

TEST(Engine, StopStringInsideOneToken) {
  TinyModel m({});
  Engine engine(m.ctx, {}, [](const std::vector<std::int32_t>& tokens) {
    std::string text;
    for (const auto token : tokens) text += fmt::format("<{}>", token);
    return text;
  });
  engine.set_model(m.view(), 1);
  Request r = request({4, 5}, 6);
  r.sampling.stop_strings = {">"};
  const Trajectory t = engine.generate({r})[0];
  EXPECT_EQ(t.response.size(), 1u);
  EXPECT_EQ(t.text, fmt::format("<{}", t.response[0]));
}

TEST(Engine, GreedyTakesTheMostLikelyAndIgnoresTheSeed) {
  Fixture f;
  Request r = request(random_tokens(6, 2), 6);
  r.sampling.temperature = 0;
  const Trajectory a = f.one(r);
  r.seed = 1234;
  r.stream = 99;
  EXPECT_EQ(f.one(r).response, a.response);
  r.sampling.temperature = 1;
  r.sampling.top_k = 1;
  const Trajectory b = f.one(r);
  EXPECT_EQ(b.response, a.response);
  for (const float logprob : b.logprobs) EXPECT_EQ(logprob, 0.0f);  // of what was sampled from
  for (const float logprob : a.logprobs) EXPECT_LT(logprob, 0.0f);
}

TEST(Engine, TheSameRequestTwiceGivesTheSameAnswer) {
  Fixture f;
  const Request r = request(random_tokens(6, 2), 6, 7);
  const auto both = f.engine.generate({r, r});
  EXPECT_EQ(both[0].response, both[1].response);
  EXPECT_EQ(both[0].logprobs, both[1].logprobs);
  Request other = r;
  other.stream = 8;
  EXPECT_NE(f.one(other).response, both[0].response);
  other = r;
  other.seed = 43;
  EXPECT_NE(f.one(other).response, both[0].response);
}

TEST(Engine, AbortInEveryState) {
  Options o;
  o.prefill_chunk = 4;
  o.max_num_seqs = 2;
  Fixture f(o);
  const Request r = request(random_tokens(10, 1), 6);
  const std::int64_t fresh = f.engine.submit(r), prefilling = f.engine.submit(r),
                     decoding = f.engine.submit(r), waiting = f.engine.submit(r);
  EXPECT_TRUE(f.engine.abort(fresh));
  EXPECT_FALSE(f.engine.abort(fresh));
  f.engine.step();
  EXPECT_TRUE(f.engine.abort(prefilling));
  for (int i = 0; i < 5; ++i) f.engine.step();
  EXPECT_TRUE(f.engine.abort(decoding));
  EXPECT_FALSE(f.engine.abort(12345));
  while (f.engine.step()) {
  }
  EXPECT_FALSE(f.engine.abort(waiting));
  const auto finished = f.engine.take_finished();
  ASSERT_EQ(finished.size(), 4u);
  EXPECT_TRUE(f.engine.take_finished().empty());
  const Trajectory whole = f.one(r);
  EXPECT_EQ(finished[0].id, fresh);
  EXPECT_EQ(finished[0].trajectory.finish, FinishReason::kAbort);
  EXPECT_TRUE(finished[1].trajectory.response.empty());
  const Trajectory& partial = finished[2].trajectory;
  EXPECT_EQ(partial.finish, FinishReason::kAbort);
  ASSERT_GT(partial.response.size(), 0u);
  ASSERT_LT(partial.response.size(), 6u);
  EXPECT_TRUE(std::equal(partial.response.begin(), partial.response.end(), whole.response.begin()));
  EXPECT_EQ(partial.text, whole.text.substr(0, partial.response.size()));
  EXPECT_EQ(finished[3].id, waiting);
  EXPECT_EQ(finished[3].trajectory.response, whole.response);
}

TEST(Engine, WeightsMayChangeBetweenRequests) {
  Fixture f;
  TinyModel other({}, 2);
  const Request r = request(random_tokens(10, 1), 6);
  const Trajectory before = f.one(r);
  f.engine.submit(r);
  EXPECT_THROW(f.engine.set_model(other.view(), 2), base::ContractError);
  while (f.engine.step()) {
  }
  f.engine.set_model(other.view(), 2);
  const Trajectory after = f.one(r);
  EXPECT_EQ(after.weight_version, 2u);
  EXPECT_NE(after.response, before.response);
  f.engine.set_model(f.model.view(), 3);
  EXPECT_EQ(f.one(r).logprobs, before.logprobs);
  EXPECT_EQ(f.engine.take_finished().size(), 1u);
}

TEST(Engine, ProgressCountsAndMayThrow) {
  Fixture f;
  std::vector<Request> requests = mixed_requests(20);
  Progress last;
  const auto answers = f.engine.generate(requests, [&](const Progress& p) {
    EXPECT_GE(p.finished, last.finished);
    EXPECT_EQ(p.total, 20);
    last = p;
  });
  std::int64_t tokens = 0;
  for (const Trajectory& t : answers) tokens += static_cast<std::int64_t>(t.response.size());
  EXPECT_EQ(last.finished, 20);
  EXPECT_EQ(last.tokens, tokens);
  EXPECT_EQ(f.engine.stats().generated_tokens, tokens);
  EXPECT_THROW(f.engine.generate(requests, [](const Progress&) { throw InputError("stop"); }),
               InputError);
  EXPECT_EQ(f.engine.unfinished(), 0);
  EXPECT_TRUE(f.engine.take_finished().empty());
  EXPECT_EQ(f.engine.generate(requests)[19].logprobs, answers[19].logprobs);
}

TEST(Engine, BrokenWeightsShowAsNanAndDoNotHang) {
  Fixture f;
  const auto head = f.model.weights.view(f.model.weights.table.head);
  std::memset(head.data, 0xFF, head.bytes());
  const Trajectory t = f.one(request({1, 2, 3}, 4));
  ASSERT_EQ(t.response.size(), 4u);
  for (const float logprob : t.logprobs) EXPECT_TRUE(std::isnan(logprob));
}

TEST(Engine, OnePromptIsComputedOnce) {
  Fixture f;
  std::vector<Request> requests;
  for (int i = 0; i < 8; ++i) requests.push_back(request(random_tokens(10, 1), 4, i));
  f.engine.generate(requests);
  EXPECT_EQ(f.engine.stats().prefill_tokens, 10);
  EXPECT_EQ(f.engine.stats().shared_prefix_tokens, 70);
  EXPECT_EQ(f.engine.stats().decode_tokens, 24);
  EXPECT_EQ(f.engine.stats().steps, 4);
}

}  // namespace
}  // namespace lockstep::rollout::test

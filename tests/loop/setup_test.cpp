#include "loop/setup.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "base/error.h"

namespace lockstep::loop {
namespace {

TEST(Setup, RewardShapingKeysActWithAndWithoutAPreset) {
  for (const char* name : {"dapo", "grpo"}) {
    SCOPED_TRACE(name);
    RunConfig c;
    c.grpo.adv_estimator.name = name;
    c.grpo.reward_shaping.enabled = true;
    c.policy.generation.max_new_tokens = 50;
    rl::RewardShaping s = estimator(c).advantages.reward_shaping;
    EXPECT_TRUE(s.enabled);
    EXPECT_EQ(s.overlong_buffer_length, 10);
    EXPECT_EQ(s.overlong_buffer_penalty, 1.0);
    EXPECT_EQ(s.max_response_length, 50);
    c.grpo.reward_shaping.max_response_length = 40;
    EXPECT_EQ(estimator(c).advantages.reward_shaping.overlong_buffer_length, 8);
    c.grpo.reward_shaping.overlong_buffer_length = 7;
    c.grpo.reward_shaping.overlong_buffer_penalty = 0.25;
    s = estimator(c).advantages.reward_shaping;
    EXPECT_EQ(s.overlong_buffer_length, 7);
    EXPECT_EQ(s.overlong_buffer_penalty, 0.25);
    EXPECT_EQ(s.max_response_length, 40);
    c.grpo.reward_shaping.overlong_buffer_length = 41;
    EXPECT_THROW(estimator(c), base::InputError);
  }
  RunConfig c;
  c.grpo.adv_estimator.name = "dapo";
  EXPECT_TRUE(estimator(c).advantages.reward_shaping.enabled);
  c.grpo.reward_shaping.enabled = false;
  EXPECT_FALSE(estimator(c).advantages.reward_shaping.enabled);
}

TEST(Setup, StopTokensComeBesidesTheModelsOwn) {
  model::ModelConfig model;
  model.vocab_size = 20;
  model.eos_token_ids = {3, 4};
  RunConfig c;
  EXPECT_EQ(sampling_params(c, model).stop_token_ids, (std::vector<std::int32_t>{3, 4}));
  c.policy.generation.stop_token_ids = {9, 4};
  EXPECT_EQ(sampling_params(c, model).stop_token_ids, (std::vector<std::int32_t>{9, 4, 3}));
}

TEST(Setup, ConversationsGoThroughTheChatTemplateOfAModelThatHasOne) {
  data::Prompt question;
  question.text = "hi<|im_end|>";
  question.messages = {{"user", "hi"}};

  data::Prompt plain = question;
  const model::Tokenizer bytes = model::byte_tokenizer();
  encode_prompt(bytes, "Be short. ", plain);
  EXPECT_EQ(plain.text, "Be short. hi<|im_end|>");
  EXPECT_EQ(plain.tokens.size(), plain.text.size());

  model::Tokenizer t = model::read_tokenizer(LOCKSTEP_TEST_DATA "/tokenizer/qwen.json");
  data::Prompt joined = question;
  encode_prompt(t, "", joined);  // no template: a text, in which nothing is special
  EXPECT_EQ(joined.text, "hi<|im_end|>");
  for (const std::int32_t id : joined.tokens) EXPECT_FALSE(t.is_special(id));

  t.chat_template = model::recognise_chat_template("'<|im_start|>' '<|im_end|>'");
  data::Prompt chat = question;
  encode_prompt(t, "Be short.", chat);
  EXPECT_EQ(chat.text,
            "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\n");
  EXPECT_EQ(model::decode(t, chat.tokens, false), chat.text);
  EXPECT_EQ(std::count_if(chat.tokens.begin(), chat.tokens.end(),
                          [&](std::int32_t id) { return t.is_special(id); }),
            5);

  t.chat_template = model::recognise_chat_template("{{ '<|user|>' }}");
  EXPECT_THROW(encode_prompt(t, "", question), base::InputError);
}

}  // namespace
}  // namespace lockstep::loop

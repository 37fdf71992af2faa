// What the PyPI package `tokenizers` gives for the files of tests/data/tokenizer
// (tools/golden/tokenizer.py).
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "model/tokenizer.h"

namespace lockstep::model {
namespace {

using Ids = std::vector<std::int32_t>;
using nlohmann::json;

const std::string kFolder = LOCKSTEP_TEST_DATA "/tokenizer/";

json read_json(const std::string& path) {
  std::ifstream in(path);
  return json::parse(in);
}

struct TokenizerGolden : testing::TestWithParam<const char*> {
  Tokenizer tokenizer = read_tokenizer(kFolder + GetParam() + ".json");
  json golden = read_json(kFolder + GetParam() + ".cases.json");
};

TEST_P(TokenizerGolden, encodes_and_decodes_as_tokenizers_does) {
  ASSERT_GT(golden["cases"].size(), 60u);
  for (const json& row : golden["cases"]) {
    const std::string text = row[0];
    SCOPED_TRACE(row[0].dump());
    const Ids ids = row[1], bare = row[2].is_null() ? ids : row[2].get<Ids>();
    EXPECT_EQ(encode(tokenizer, text), ids);
    EXPECT_EQ(encode(tokenizer, text, {.add_special = false}), bare);
    EXPECT_EQ(decode(tokenizer, ids), row[3].get<std::string>());
    EXPECT_EQ(decode(tokenizer, ids, false), row[4].get<std::string>());
  }
}

TEST_P(TokenizerGolden, decodes_any_ids_whole_and_as_a_stream) {
  ASSERT_GT(golden["decode"].size(), 50u);
  const auto streamed = [&](const Ids& ids, bool skip_special) {
    TokenStream stream(tokenizer, skip_special);
    std::string text;
    for (const std::int32_t id : ids) {
      const std::string piece = stream.push(id);
      EXPECT_TRUE(is_valid_utf8(piece));
      text += piece;
    }
    return text + stream.finish();
  };
  for (const json& row : golden["decode"]) {
    SCOPED_TRACE(row.dump());
    const Ids ids = row[0];
    EXPECT_EQ(decode(tokenizer, ids), row[1].get<std::string>());
    EXPECT_EQ(streamed(ids, true), row[1].get<std::string>());
  }
  for (const json& row : golden["cases"]) {
    EXPECT_EQ(streamed(row[1], true), row[3].get<std::string>()) << row.dump();
    EXPECT_EQ(streamed(row[1], false), row[4].get<std::string>()) << row.dump();
  }
}

TEST_P(TokenizerGolden, text_from_outside_makes_no_special_token) {
  for (const json& row : golden["cases"])
    for (const std::int32_t id : encode_ordinary(tokenizer, row[0].get<std::string>()))
      EXPECT_FALSE(tokenizer.is_special(id) && id != 0) << row.dump();  // 0 is <unk> of two of them
}

INSTANTIATE_TEST_SUITE_P(Styles, TokenizerGolden,
                         testing::Values("qwen", "llama3", "deepseek", "gpt2", "smollm", "odd",
                                         "mixtral", "holes", "words", "metaspace",
                                         "metaspace_first", "metaspace_never", "o200k", "gemma",
                                         "falcon"),
                         [](const auto& info) { return std::string(info.param); });

TEST(TokenizerStream, gives_characters_as_soon_as_they_are_certain) {
  std::vector<std::string> pieces;
  const Tokenizer bytes = byte_tokenizer();
  TokenStream raw(bytes);
  pieces.clear();
  for (const char c : std::string("a\xF0\x9F\x98\x80\xC3z\xE2\x82"))
    pieces.push_back(raw.push(static_cast<unsigned char>(c)));
  EXPECT_EQ(pieces, (std::vector<std::string>{"a", "", "", "", "\xF0\x9F\x98\x80", "",
                                              "\xEF\xBF\xBDz", "", ""}));
  EXPECT_EQ(raw.finish(), "\xEF\xBF\xBD");
  EXPECT_EQ(raw.finish(), "");
}

TEST(TokenizerStream, long_words_are_as_fast_as_short_ones) {
  const Tokenizer t = read_tokenizer(kFolder + "mixtral.json");
  // 300,000 characters without a boundary: a quadratic loop would take minutes.
  const std::string text(300'000, 'e');
  EXPECT_EQ(decode(t, encode(t, text)), text);
  const Tokenizer q = read_tokenizer(kFolder + "qwen.json");
  std::string marks = "e";
  for (int i = 0; i < 100'000; ++i) marks += "\xCC\x81\xCC\x96";  // classes 230, 220, ...
  EXPECT_GT(encode(q, marks).size(), 1000u);
  EXPECT_GT(encode(q, std::string(500'000, ' ')).size(), 1000u);
}

TEST(TokenizerText, what_is_not_utf8_becomes_the_replacement_character) {
  const Tokenizer t = read_tokenizer(kFolder + "qwen.json");
  EXPECT_EQ(encode(t, "a\xFF\xE2\x82z"), encode(t, "a\xEF\xBF\xBD\xEF\xBF\xBDz"));
  EXPECT_EQ(decode(t, {-1, 1 << 30, 2147483647}), "");
}

}  // namespace
}  // namespace lockstep::model

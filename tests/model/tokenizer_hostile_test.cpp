// Malformed, unsupported and hostile tokenizer.json: one clear error that names file and part.
#include <nlohmann/json.hpp>

#include "model/bpe.h"
#include "model/strict_json.h"
#include "model/temp_folder.h"
#include "model/tokenizer.h"

namespace lockstep::model {
namespace {

using nlohmann::json;

struct HostileTokenizer : TempFolderTest {
  std::string good = file_bytes(LOCKSTEP_TEST_DATA "/tokenizer/qwen.json");

  void refused(const std::string& bytes, std::initializer_list<std::string> parts) {
    put_file(folder / "tokenizer.json", bytes);
    const std::string message = expect_refused([&] { read_tokenizer(folder); }, parts);
    EXPECT_NE(message.find((folder / "tokenizer.json").string()), std::string::npos) << message;
    EXPECT_LT(message.size(), 600u);
  }
  template <typename Change>
  void changed(std::initializer_list<std::string> parts, const Change& change) {
    json document = json::parse(good);
    change(document);
    refused(document.dump(), parts);
  }
  template <typename Change>
  Tokenizer accepted(const Change& change) {
    json document = json::parse(good);
    change(document);
    put_file(folder / "tokenizer.json", document.dump());
    return read_tokenizer(folder);
  }
};

TEST_F(HostileTokenizer, is_not_json_or_not_an_object) {
  refused("", {"not valid JSON"});
  refused("[1]", {"expected a JSON object"});
  for (std::size_t size = 1; size < good.size(); size += 997) refused(good.substr(0, size), {});
  refused(std::string(1'000'000, '['), {"nested deeper"});
  std::string deep;
  for (int i = 0; i < 1'000'000; ++i) deep += "{\"a\":";
  refused(deep, {"nested deeper"});
  refused(R"({"model": {"vocab": {"a": 0, "a": 1}, "merges": []}})", {"key 'a' twice"});
  refused("{\"version\": \"\xFF\"}", {"not valid JSON"});
  put_file(folder / "tokenizer.json", std::string((64 << 20) + 1, ' '));
  expect_refused([&] { read_tokenizer(folder); }, {"tokenizer.json"});
  std::filesystem::remove(folder / "tokenizer.json");
  expect_refused([&] { read_tokenizer(folder); }, {(folder / "tokenizer.json").string()});
}

TEST_F(HostileTokenizer, has_kinds_that_are_not_supported) {
  for (const char* type : {"WordPiece", "Unigram", "WordLevel", "Frobnicate"})
    changed({type, "BPE"}, [&](json& d) { d["model"]["type"] = type; });
  refused(R"({"normalizer": {"type": "Precompiled"}, "model": {"type": "Unigram", "vocab": []}})",
          {"Unigram"});
  for (const char* type : {"BertNormalizer", "Precompiled", "Nmt", "StripAccents"})
    changed({"normalizer", type}, [&](json& d) { d["normalizer"] = {{"type", type}}; });
  for (const char* type : {"UnicodeScripts", "FixedLength", "BertPreTokenizer"})
    changed({"pre_tokenizer", type}, [&](json& d) { d["pre_tokenizer"] = {{"type", type}}; });
  for (const char* type : {"WordPiece", "CTC", "BPEDecoder"})
    changed({"decoder", type}, [&](json& d) { d["decoder"] = {{"type", type}}; });
  changed({"post_processor", "BertProcessing"}, [](json& d) {
    d["post_processor"] = {{"type", "BertProcessing"}};
  });
  changed({"unknown key 'x'"}, [](json& d) { d["x"] = 1; });
  changed({"model", "unknown key 'x'"}, [](json& d) { d["model"]["x"] = 1; });
  changed({"normalizer", "unknown key"}, [](json& d) { d["normalizer"]["x"] = 1; });
  changed({"version", "2.0"}, [](json& d) { d["version"] = "2.0"; });
  changed({"truncation"}, [](json& d) { d["truncation"] = {{"max_length", 3}}; });
  changed({"padding"}, [](json& d) { d["padding"] = json::object(); });
  changed({"dropout"}, [](json& d) { d["model"]["dropout"] = 0.1; });
  changed({"continuing_subword_prefix"},
          [](json& d) { d["model"]["continuing_subword_prefix"] = "##"; });
  changed({"end_of_word_suffix"}, [](json& d) { d["model"]["end_of_word_suffix"] = "</w>"; });
  changed({"behavior", "Sideways"},
          [](json& d) { d["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Sideways"; });
}

TEST_F(HostileTokenizer, has_a_bad_metaspace) {
  for (const char* place : {"pre_tokenizer", "decoder"}) {
    const auto bad = [&](const json& more, std::initializer_list<std::string> parts) {
      changed(parts, [&](json& d) {
        d[place] = {{"type", "Metaspace"}, {"replacement", "\u2581"}};
        d[place].update(more);
      });
    };
    bad({{"replacement", ""}}, {place, "replacement", "one character"});
    bad({{"replacement", "__"}}, {place, "replacement", "one character"});
    bad({{"replacement", 3}}, {place, "replacement"});
    bad({{"prepend_scheme", "Always"}}, {place, "prepend_scheme", "'Always'"});
    bad({{"add_prefix_space", false}}, {place, "add_prefix_space", "prepend_scheme"});
    bad({{"split", "yes"}}, {place, "split"});
    bad({{"surprise", 1}}, {place, "surprise"});
  }
  changed({"pre_tokenizer", "replacement"}, [](json& d) {
    d["pre_tokenizer"] = {{"type", "Metaspace"}};
  });
  changed({"delimiter", "one character"}, [](json& d) {
    d["pre_tokenizer"] = {{"type", "CharDelimiterSplit"}, {"delimiter", "--"}};
  });
  changed({"normalizer", "'first'"}, [](json& d) {
    d["normalizer"] = {{"type", "Strip"}, {"strip_left", true}, {"strip_right", false}};
    d["pre_tokenizer"] = {{"type", "Metaspace"}, {"replacement", "_"}, {"prepend_scheme", "first"}};
  });
  changed({"two Metaspace"}, [](json& d) {
    json steps = json::array();
    for (int i = 0; i < 3; ++i) steps.push_back({{"type", "Metaspace"}, {"replacement", "_"}});
    d["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", steps}};
  });
}

TEST_F(HostileTokenizer, has_a_bad_vocabulary_or_bad_merges) {
  changed({"model is missing"}, [](json& d) { d.erase("model"); });
  changed({"model.vocab", "object"}, [](json& d) { d["model"]["vocab"] = 3; });
  changed({"model.vocab['zz']", "integer"}, [](json& d) { d["model"]["vocab"]["zz"] = "5"; });
  changed({"model.vocab['zz']", "-1"}, [](json& d) { d["model"]["vocab"]["zz"] = -1; });
  changed({"model.vocab['zz']"}, [](json& d) { d["model"]["vocab"]["zz"] = 2147483648u; });
  changed({"model.vocab['zz']"},
          [](json& d) { d["model"]["vocab"]["zz"] = 18446744073709551615u; });
  changed({"is also that of"}, [](json& d) { d["model"]["vocab"]["zz"] = 5; });
  const auto merge = [&](const json& m, std::initializer_list<std::string> parts) {
    changed(parts, [&](json& d) { d["model"]["merges"].push_back(m); });
  };
  merge({"a", "nobody"}, {"model.merges[", "'nobody'", "not in the vocabulary"});
  merge("a b c", {"model.merges[", "one space"});
  merge("ab", {"model.merges[", "one space"});
  merge({"a"}, {"model.merges[", "pair"});
  merge({"a", 3}, {"model.merges["});
  merge(7, {"model.merges["});
  merge({"a", "\xC4\xA0\xC4\xA0\xC4\xA0"}, {"model.merges["});
  changed({"added_tokens[2]", "twice"},
          [](json& d) { d["added_tokens"][2] = d["added_tokens"][1]; });
}

TEST_F(HostileTokenizer, has_bad_added_tokens) {
  const auto token = [&](const char* key, const json& value,
                         std::initializer_list<std::string> parts) {
    changed(parts, [&](json& d) { d["added_tokens"][1][key] = value; });
  };
  token("id", -1, {"added_tokens[1].id"});
  token("id", 2147483648u, {"added_tokens[1].id"});
  token("id", 5000, {"added_tokens[1]", "5000"});
  token("id", 0, {"added_tokens[1]"});
  token("content", "", {"added_tokens[1].content", "empty"});
  token("content", std::string(1 << 20, 'x'), {"added_tokens[1].content", "1048576"});
  token("lstrip", 1, {"added_tokens[1].lstrip"});
  token("surprise", 1, {"added_tokens[1]", "surprise"});
  changed({"special_tokens", "<nobody>"}, [](json& d) {
    d["post_processor"] = {{"type", "TemplateProcessing"},
                           {"single", {{{"SpecialToken", {{"id", "<nobody>"}, {"type_id", 0}}}}}},
                           {"pair", json::array()},
                           {"special_tokens", json::object()}};
  });
}

TEST_F(HostileTokenizer, has_bad_regular_expressions) {
  const auto regex = [](json& d) -> json& {
    return d["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"];
  };
  const auto bad = [&](const std::string& pattern, std::initializer_list<std::string> parts) {
    changed(parts, [&](json& d) { regex(d) = pattern; });
  };
  bad("(a", {"pre_tokenizer", "(a", "does not compile"});
  bad("[a", {"pre_tokenizer", "']'"});
  bad("\\p{Nobody}", {"pre_tokenizer", "does not compile"});
  bad("(?R)", {"(?R)"});
  bad("(?{system})", {"not supported"});
  bad("(?C1)", {"not supported"});
  bad("(*UTF)a", {"verb"});
  bad("(a)\\1", {"\\1"});
  bad("a\\Kb", {"\\K"});
  bad("[a-z&&[^b]]", {"&&"});
  bad("[[:alpha:]]", {"POSIX"});
  bad("(?m:.)", {"(?m:"});
  bad("[\\W]", {"\\W inside a class"});
  bad("a{2}+", {"'+' behind"});
  bad(std::string(200, '(') + "a" + std::string(200, ')'), {"does not compile"});
  bad(std::string(70'000, 'a'), {"70000 bytes"});

  // A catastrophic one ends with an error that names it, soon.
  for (const char* pattern : {"(a+)+$", "(a|aa)+$", "(?:a|a)*(?:b|$)"}) {
    const Tokenizer t = accepted([&](json& d) { regex(d) = pattern; });
    expect_refused([&] { encode(t, std::string(5000, 'a') + "!"); },
                   {"tokenizer.json", "pre_tokenizer", pattern});
  }
}

TEST_F(HostileTokenizer, makes_texts_grow_without_end) {
  const Tokenizer t = accepted([](json& d) {
    json steps = json::array();
    for (int i = 0; i < 20; ++i)
      steps.push_back({{"type", "Replace"},
                       {"pattern", {{"String", "a"}}},
                       {"content", std::string(4000, 'a')}});
    d["normalizer"] = {{"type", "Sequence"}, {"normalizers", steps}};
    d["added_tokens"] = json::array();
  });
  expect_refused([&] { encode(t, "a"); }, {"grows beyond"});
  changed({"two ByteLevel"}, [](json& d) {
    json steps = json::array();
    for (int i = 0; i < 20; ++i) steps.push_back({{"type", "ByteLevel"}});
    d["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", steps}};
  });
  changed({"64 steps"}, [](json& d) {
    json steps = json::array();
    for (int i = 0; i < 65; ++i) steps.push_back({{"type", "NFC"}});
    d["normalizer"] = {{"type", "Sequence"}, {"normalizers", steps}};
  });
}

TEST_F(HostileTokenizer, lacks_its_unk_token_only_where_a_text_needs_it) {
  const Tokenizer t = accepted([](json& d) {
    d["model"]["unk_token"] = "<none>";
    d["pre_tokenizer"] = nullptr;
  });
  EXPECT_FALSE(encode(t, "abc").empty());
  expect_refused([&] { encode(t, "\xE4\xB8\x80"); }, {"unk_token", "<none>"});
}

// Merges in any order of words: the short loop and the heap agree, and with a plain reference.
TEST(BpeMerges, long_and_short_words_follow_the_same_rule) {
  const json document = json::parse(
      R"({"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "ba": 3, "aa": 4, "aba": 5, "abab": 6,
          "bab": 7}, "merges": ["a a", "b a", "a b", "ab a", "ab ab", "b ab"]})");
  const Bpe bpe = read_bpe(document, false, "test");
  BpeScratch scratch;
  std::uint64_t random = 88172645463325252ull;
  for (int round = 0; round < 400; ++round) {
    std::string word;
    for (int i = 0; i < 1 + round; ++i) {
      random ^= random << 13, random ^= random >> 7, random ^= random << 17;
      word += random % 3 ? 'a' : 'b';
    }
    std::vector<std::int32_t> expected, tokens;
    for (const char c : word) expected.push_back(c - 'a');
    for (;;) {
      Merge best;
      std::size_t at = 0;
      for (std::size_t i = 0; i + 1 < expected.size(); ++i)
        if (const Merge m = bpe.merges.find(expected[i], expected[i + 1]); m.rank < best.rank)
          best = m, at = i;
      if (best.rank == Merge::kNone) break;
      expected[at] = best.id;
      expected.erase(expected.begin() + static_cast<std::ptrdiff_t>(at) + 1);
    }
    encode_word(bpe, word, scratch, tokens);
    EXPECT_EQ(tokens, expected) << word;
  }
}

}  // namespace
}  // namespace lockstep::model

#include "model/tokenizer.h"

#include <nlohmann/json.hpp>

#include "model/strict_json.h"
#include "model/temp_folder.h"

namespace lockstep::model {
namespace {

using Ids = std::vector<std::int32_t>;
struct TokenizerFile : TempFolderTest {};

TEST(Tokenizer, bytes_are_their_own_ids_and_specials_follow) {
  const Tokenizer t = byte_tokenizer();
  EXPECT_EQ(encode(t, "a\n\xC3\xA9"), (Ids{97, 10, 0xC3, 0xA9}));
  EXPECT_EQ(encode(t, "<|bos|>x<|eos|><|pad|><|eos"),
            (Ids{256, 'x', 257, 258, '<', '|', 'e', 'o', 's'}));
  EXPECT_EQ(encode_ordinary(t, "<|eos|>").size(), 7u);
  EXPECT_EQ(encode(t, ""), Ids{});
  std::string all;
  for (int b = 0; b < 256; ++b) all += static_cast<char>(b);
  EXPECT_EQ(decode_bytes(t, encode(t, all)), all);
  for (int id = -1; id < 300; ++id) EXPECT_EQ(t.is_special(id), id >= 256 && id <= 258);
}

TEST(Tokenizer, decodes_specials_and_ids_it_does_not_have) {
  const Tokenizer t = byte_tokenizer();
  const Ids ids = {256, 'h', 'i', 257, 300, -5, 2147483647};
  EXPECT_EQ(decode(t, ids), "hi");
  EXPECT_EQ(decode(t, ids, false), "<|bos|>hi<|eos|>");
}

// Expected strings: Unicode 15, tables 3-8 to 3-11.
TEST(Tokenizer, ill_formed_utf8_becomes_replacement_characters) {
  const std::string r = "\xEF\xBF\xBD";
  EXPECT_EQ(valid_utf8("a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80"),
            "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80");
  EXPECT_EQ(valid_utf8("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"),
            r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(valid_utf8("\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41"),
            r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(valid_utf8("\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42"),
            r + r + r + r + r + "A" + r + r + "B");
  EXPECT_EQ(valid_utf8("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), r + r + r + r + "A");
  EXPECT_EQ(valid_utf8("\xF0\x9F"), r);
  EXPECT_EQ(valid_utf8(""), "");
}

TEST_F(TokenizerFile, survives_writing_and_reading) {
  write_tokenizer(byte_tokenizer(), folder);
  const Tokenizer t = read_tokenizer(folder);
  EXPECT_EQ(t.vocab_size, 259);
  EXPECT_EQ(t.eos_id, 257);
  const std::string bytes = file_bytes(folder / "tokenizer.json");
  write_tokenizer(t, folder);
  EXPECT_EQ(file_bytes(folder / "tokenizer.json"), bytes);
}

TEST_F(TokenizerFile, a_byte_tokenizer_as_a_bpe_gives_the_same_ids) {
  write_tokenizer(byte_tokenizer(), folder);
  const Tokenizer bytes = read_tokenizer(folder);
  auto document = read_json_file(folder / "tokenizer.json");
  document["decoder"]["add_prefix_space"] = true;  // changes nothing but how it is recognised
  put_file(folder / "tokenizer.json", document.dump());
  const Tokenizer bpe = read_tokenizer(folder);
  EXPECT_EQ(bytes.pipeline, nullptr);
  ASSERT_NE(bpe.pipeline, nullptr);
  EXPECT_EQ(bpe.vocab_size, 259);
  EXPECT_EQ(bpe.bos_id, 256);
  EXPECT_EQ(bpe.eos_id, 257);
  EXPECT_EQ(bpe.pad_id, 258);
  for (const char* text : {"", "a\n\xC3\xA9", "<|bos|>x<|eos|><|pad|><|eos", "\xF0\x9F\x98\x80"}) {
    EXPECT_EQ(encode(bpe, text), encode(bytes, text)) << text;
    EXPECT_EQ(encode_ordinary(bpe, text), encode_ordinary(bytes, text)) << text;
    EXPECT_EQ(decode(bpe, encode(bpe, text), false), text);
  }
}

}  // namespace
}  // namespace lockstep::model

// Text to tokens and back. Two kinds: bytes (token i < 256 is byte i, then come the special tokens;
// what Lockstep trains from nothing), and any byte-level BPE of a tokenizer.json
// (model/tokenizer_json.h). The ids are those that the Hugging Face tokenizers library gives with
// the same file.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "model/chat_template.h"
#include "model/unicode_text.h"

namespace lockstep::model {

struct TokenizerPipeline;  // model/tokenizer_json.h
class TextStream;          // model/decoder.h

struct SpecialToken {
  std::int32_t id;
  std::string text;
};

struct Tokenizer {
  std::int32_t vocab_size = 0;  // ids are below this; a model's vocabulary may be larger
  std::int32_t bos_id = -1, eos_id = -1, pad_id = -1;  // -1: the files name none
  std::vector<SpecialToken> specials;
  ChatTemplate chat_template;

  std::shared_ptr<const TokenizerPipeline> pipeline;  // null: bytes
  // Names and contents of the files it came from; null: bytes.
  std::shared_ptr<const std::vector<std::pair<std::string, std::string>>> files;

  bool is_special(std::int32_t id) const;
};

// <|bos|> 256, <|eos|> 257, <|pad|> 258.
Tokenizer byte_tokenizer();

struct EncodeOptions {
  bool special_in_text = true;  // the text of a special token becomes that token
  bool add_special = true;      // what the post-processor puts around a text
};

// The tokens of `text`; by default what `tokenizers` gives for encode(text): the text of a special
// token becomes that token, and the post-processor's tokens stand around. Bytes that are not UTF-8
// are tokens like all others of a byte tokenizer, and U+FFFD to another one.
std::vector<std::int32_t> encode(const Tokenizer& tokenizer, std::string_view text,
                                 const EncodeOptions& options = {});
// The text alone: text from outside can never make a special token, and none is added.
std::vector<std::int32_t> encode_ordinary(const Tokenizer& tokenizer, std::string_view text);

// A conversation as the model's chat template renders it, the prompt for an answer at its end;
// InputError where there is no template that Lockstep knows. Its tokens: encode() with
// special_in_text and without add_special.
std::string chat_text(const Tokenizer& tokenizer, const std::vector<data::Message>& messages);

// The bytes of the tokens. Special tokens are left out or written as their text; ids that the
// tokenizer does not have (a model's padded vocabulary, negative ids) give nothing. Only a byte
// tokenizer gives bytes that are not UTF-8.
std::string decode_bytes(const Tokenizer& tokenizer, const std::vector<std::int32_t>& tokens,
                         bool skip_special = true);
// The same as valid UTF-8: each maximal ill-formed part becomes U+FFFD.
std::string decode(const Tokenizer& tokenizer, const std::vector<std::int32_t>& tokens,
                   bool skip_special = true);

// decode(), token by token: push() gives the characters that are certain, finish() the rest;
// together they are what decode() gives, and no piece splits a character. The tokenizer must
// outlive it.
class TokenStream {
 public:
  explicit TokenStream(const Tokenizer& tokenizer, bool skip_special = true);
  ~TokenStream();
  std::string push(std::int32_t token);
  std::string finish();

 private:
  const Tokenizer& tokenizer_;
  bool skip_special_;
  std::string bytes_;  // held back, of a byte tokenizer
  std::unique_ptr<TextStream> stream_;
};

// Byte tokenizers: folder/tokenizer.json and tokenizer_config.json (which tells transformers the
// special tokens). Others: their own files, byte for byte.
void write_tokenizer(const Tokenizer& tokenizer, const std::filesystem::path& folder);

// From a folder (tokenizer.json; tokenizer_config.json, special_tokens_map.json and
// chat_template.jinja where they are there) or from a tokenizer.json of any name. InputError naming
// the file and the part that is malformed or not supported.
Tokenizer read_tokenizer(const std::filesystem::path& path);

}  // namespace lockstep::model

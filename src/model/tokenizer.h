// Text to tokens and back. Byte-level: token i < 256 is byte i, then come the special tokens. The
// ids are those that the Hugging Face tokenizers library gives with the tokenizer.json written
// here (a byte-level BPE without merges).
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace lockstep::model {

struct SpecialToken {
  std::int32_t id;
  std::string text;
};

struct Tokenizer {
  std::int32_t vocab_size = 0;  // ids are below this; a model's vocabulary may be larger
  std::int32_t bos_id = -1, eos_id = -1, pad_id = -1;
  std::vector<SpecialToken> specials;

  bool is_special(std::int32_t id) const;
};

// <|bos|> 256, <|eos|> 257, <|pad|> 258.
Tokenizer byte_tokenizer();

// The tokens of `text`; the text of a special token becomes that token. Bytes that are not UTF-8
// are tokens like all others.
std::vector<std::int32_t> encode(const Tokenizer& tokenizer, std::string_view text);
// Bytes only: text from outside can never make a special token.
std::vector<std::int32_t> encode_ordinary(const Tokenizer& tokenizer, std::string_view text);

// The bytes of the tokens. Special tokens are left out or written as their text; ids that the
// tokenizer does not have (a model's padded vocabulary, negative ids) give nothing.
std::string decode_bytes(const Tokenizer& tokenizer, const std::vector<std::int32_t>& tokens,
                         bool skip_special = true);
// The same as valid UTF-8: each maximal ill-formed part becomes U+FFFD.
std::string decode(const Tokenizer& tokenizer, const std::vector<std::int32_t>& tokens,
                   bool skip_special = true);

// `bytes` with each maximal ill-formed part replaced by U+FFFD (Unicode 15, section 3.9, table
// 3-7).
std::string valid_utf8(std::string_view bytes);

// folder/tokenizer.json (and tokenizer_config.json, which tells transformers the special tokens).
void write_tokenizer(const Tokenizer& tokenizer, const std::filesystem::path& folder);
// Recognises exactly what write_tokenizer writes, whatever the order of keys or the white space;
// any other tokenizer.json is an InputError that names the first part that differs.
Tokenizer read_tokenizer(const std::filesystem::path& folder);

}  // namespace lockstep::model

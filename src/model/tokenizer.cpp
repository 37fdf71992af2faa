#include "model/tokenizer.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file_io.h"
#include "model/strict_json.h"

namespace lockstep::model {

using base::fail;
using base::InputError;
using nlohmann::json;

static constexpr int kBytes = 256;
static constexpr std::size_t kTokenizerFileLimit = 64 << 20;

bool Tokenizer::is_special(std::int32_t id) const {
  return std::any_of(specials.begin(), specials.end(),
                     [id](const SpecialToken& s) { return s.id == id; });
}

Tokenizer byte_tokenizer() {
  Tokenizer t;
  t.bos_id = kBytes;
  t.eos_id = kBytes + 1;
  t.pad_id = kBytes + 2;
  t.specials = {{t.bos_id, "<|bos|>"}, {t.eos_id, "<|eos|>"}, {t.pad_id, "<|pad|>"}};
  t.vocab_size = kBytes + 3;
  return t;
}

std::vector<std::int32_t> encode_ordinary(const Tokenizer&, std::string_view text) {
  std::vector<std::int32_t> tokens;
  tokens.reserve(text.size());
  for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
  return tokens;
}

std::vector<std::int32_t> encode(const Tokenizer& tokenizer, std::string_view text) {
  std::vector<std::int32_t> tokens;
  tokens.reserve(text.size());
  while (!text.empty()) {
    const SpecialToken* special = nullptr;
    for (const SpecialToken& s : tokenizer.specials)
      if (text.starts_with(s.text)) special = &s;
    tokens.push_back(special ? special->id : static_cast<unsigned char>(text.front()));
    text.remove_prefix(special ? special->text.size() : 1);
  }
  return tokens;
}

std::string decode_bytes(const Tokenizer& tokenizer, const std::vector<std::int32_t>& tokens,
                         bool skip_special) {
  std::string text;
  for (const std::int32_t id : tokens) {
    if (id >= 0 && id < kBytes) text += static_cast<char>(id);
    if (id < kBytes || skip_special) continue;
    for (const SpecialToken& s : tokenizer.specials)
      if (s.id == id) text += s.text;
  }
  return text;
}

std::string decode(const Tokenizer& tokenizer, const std::vector<std::int32_t>& tokens,
                   bool skip_special) {
  return valid_utf8(decode_bytes(tokenizer, tokens, skip_special));
}

std::string valid_utf8(std::string_view bytes) {
  const auto at = [&](std::size_t i) {
    return i < bytes.size() ? static_cast<unsigned char>(bytes[i]) : 0;
  };
  std::string out;
  for (std::size_t i = 0; i < bytes.size();) {
    const unsigned lead = at(i);
    // Length of the sequence and the range of its second byte; later bytes are 80..BF.
    std::size_t length = 1;
    unsigned low = 0x80, high = 0xBF;
    bool good = lead < 0x80;
    if (lead >= 0xC2 && lead <= 0xF4) {
      good = true;
      length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
      if (lead == 0xE0) low = 0xA0;
      if (lead == 0xED) high = 0x9F;
      if (lead == 0xF0) low = 0x90;
      if (lead == 0xF4) high = 0x8F;
    }
    std::size_t have = 1;
    while (good && have < length) {
      const unsigned next = at(i + have);
      good = next >= low && next <= high;
      low = 0x80, high = 0xBF;
      if (good) ++have;
    }
    out += good ? bytes.substr(i, length) : std::string_view("\xEF\xBF\xBD");
    i += have;
  }
  return out;
}

namespace {

void append_utf8(std::string& out, unsigned code) {  // code < 0x800
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else {
    out += static_cast<char>(0xC0 | (code >> 6));
    out += static_cast<char>(0x80 | (code & 0x3F));
  }
}

// The character that stands for a byte in byte-level vocabularies (GPT-2): printable Latin-1 bytes
// are themselves, the others follow from U+0100 in order.
std::vector<std::string> byte_characters() {
  std::vector<std::string> characters(kBytes);
  unsigned next = 0x100;
  for (unsigned b = 0; b < kBytes; ++b) {
    const bool printable =
        (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || (b >= 0xAE && b <= 0xFF);
    append_utf8(characters[b], printable ? b : next++);
  }
  return characters;
}

json tokenizer_json(const Tokenizer& tokenizer) {
  json added = json::array(), vocab = json::object();
  for (const SpecialToken& s : tokenizer.specials)
    added.push_back({{"id", s.id},
                     {"content", s.text},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  const std::vector<std::string> characters = byte_characters();
  for (int b = 0; b < kBytes; ++b) vocab[characters[b]] = b;
  const json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", false}};
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", added},
          {"normalizer", nullptr},
          {"pre_tokenizer", byte_level},
          {"post_processor", nullptr},
          {"decoder", byte_level},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"ignore_merges", false},
            {"vocab", vocab},
            {"merges", json::array()}}}};
}

std::string text_of(const Tokenizer& tokenizer, std::int32_t id) {
  return decode_bytes(tokenizer, {id}, false);
}

}  // namespace

void write_tokenizer(const Tokenizer& tokenizer, const std::filesystem::path& folder) {
  base::write_file_atomic(folder / "tokenizer.json", json_text(tokenizer_json(tokenizer)));
  base::write_file_atomic(folder / "tokenizer_config.json",
                          json_text({{"tokenizer_class", "PreTrainedTokenizerFast"},
                                     {"bos_token", text_of(tokenizer, tokenizer.bos_id)},
                                     {"eos_token", text_of(tokenizer, tokenizer.eos_id)},
                                     {"pad_token", text_of(tokenizer, tokenizer.pad_id)},
                                     {"clean_up_tokenization_spaces", false}}));
}

Tokenizer read_tokenizer(const std::filesystem::path& folder) {
  const auto path = folder / "tokenizer.json";
  const json found = read_json_file(path, kTokenizerFileLimit);
  Tokenizer tokenizer = byte_tokenizer();
  const json expected = tokenizer_json(tokenizer);
  const auto refuse = [&](const std::string& part) {
    fail<InputError>(
        "{}: {}: only the byte-level tokenizer that Lockstep writes is supported (a BPE without "
        "merges and with the special tokens <|bos|>, <|eos|>, <|pad|>)",
        path.string(), part);
  };
  for (const auto& [key, value] : expected.items()) {
    if (!found.contains(key)) refuse(key + " is missing");
    if (key != "model" && found.at(key) != value) refuse(key + " differs");
  }
  for (const auto& [key, value] : found.items())
    if (!expected.contains(key)) refuse("unknown key " + key);
  const json& model = found.at("model");
  if (!model.is_object()) refuse("model differs");
  for (const auto& [key, value] : expected.at("model").items())
    if (!model.contains(key) || model.at(key) != value) refuse("model." + key + " differs");
  if (model.size() != expected.at("model").size()) refuse("model has unknown keys");
  return tokenizer;
}

}  // namespace lockstep::model

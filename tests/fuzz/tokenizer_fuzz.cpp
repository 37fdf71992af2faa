// A tokenizer.json and a text, split at the first NUL: what loads must encode the text, and decode
// it whole and as a stream to the same. The text is tried as a chat template, too.
#include <cstdlib>
#include <cstring>

#include "fuzz/fuzz.h"
#include "model/chat_template.h"
#include "model/decoder.h"
#include "model/strict_json.h"
#include "model/tokenizer_json.h"

using namespace lockstep;

namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

void try_tokenizer(std::string_view document, std::string_view text) {
  model::Tokenizer t;
  t.pipeline = std::make_shared<model::TokenizerPipeline>(
      model::read_pipeline(model::parse_strict_json(document, "tokenizer.json"), "tokenizer.json"));
  const auto count = static_cast<std::int32_t>(t.pipeline->texts.size());
  for (const bool special : {true, false}) {
    const auto ids = model::encode(t, text, {.special_in_text = special, .add_special = special});
    for (const std::int32_t id : ids) require(id >= 0);
    const std::string whole = model::decode(t, ids, !special);
    require(model::is_valid_utf8(whole));
    model::TokenStream stream(t, !special);
    std::string pieces;
    for (const std::int32_t id : ids) {
      const std::string piece = stream.push(id);
      require(model::is_valid_utf8(piece));
      pieces += piece;
    }
    require(pieces + stream.finish() == whole);
  }
  model::decode(t, {-1, 0, count - 1, count, INT32_MAX}, false);
}

void try_template(std::string_view jinja) {
  const model::ChatTemplate chat = model::recognise_chat_template(jinja);
  model::render_chat(chat, {{"system", "s"}, {"user", "u</think>"}, {"assistant", "<think>a"}}, {});
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view all(reinterpret_cast<const char*>(data), size);
  const std::size_t cut = std::min(all.find('\0'), size);
  const std::string_view text = cut < size ? all.substr(cut + 1, 4096) : "";
  try {
    try_template(text);
  } catch (const base::InputError&) {
  }
  try {
    try_tokenizer(all.substr(0, cut), text);
  } catch (const base::InputError&) {
  }
  return 0;
}

std::vector<std::string> fuzz::seeds() {
  const std::string tokens = R"("added_tokens": [
    {"id": 9, "content": "<x>", "single_word": false, "lstrip": true, "rstrip": true,
     "normalized": false, "special": true},
    {"id": 10, "content": "Ab", "single_word": true, "lstrip": false, "rstrip": false,
     "normalized": true, "special": false}],)";
  const std::string vocab = R"("vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "Ġa": 4, "<0xC3>": 5,
    "<0xA9>": 6, "Ã": 7, "©": 8}, "merges": [["a", "b"], ["Ġ", "a"]])";
  const std::string text =
      std::string(1, '\0') + "ab Ab <x> aaba é e\xCC\x81 12345 \xF0\x9F\x98\x80\xFF";
  return {"{" + tokens + R"("normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence",
    "pretokenizers": [{"type": "Split", "pattern": {"Regex":
    "(?i:'s|'t)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"},
    "behavior": "Isolated", "invert": false}, {"type": "Digits", "individual_digits": true},
    {"type": "ByteLevel", "add_prefix_space": true, "use_regex": true}]},
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<x>",
    "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens":
    {"<x>": {"id": "<x>", "ids": [9], "tokens": ["<x>"]}}}, "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "ignore_merges": true, )" +
              vocab + "}}" + text,
          "{" + tokens + R"("normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend",
    "prepend": "a"}, {"type": "Replace", "pattern": {"String": " "}, "content": "Ġ"},
    {"type": "Lowercase"}, {"type": "NFKD"}, {"type": "Strip"}]}, "decoder": {"type": "Sequence",
    "decoders": [{"type": "Replace", "pattern": {"String": "Ġ"}, "content": " "},
    {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1,
    "stop": 0}]}, "model": {"unk_token": "a", "fuse_unk": true, "byte_fallback": true, )" +
              vocab + "}}" + text,
          "{" + tokens + R"("pre_tokenizer": {"type": "Sequence", "pretokenizers": [
    {"type": "CharDelimiterSplit", "delimiter": "-"}, {"type": "Metaspace", "replacement": "Ġ",
    "prepend_scheme": "first", "split": true}]}, "decoder": {"type": "Sequence", "decoders": [
    {"type": "Metaspace", "replacement": "Ġ", "prepend_scheme": "always"},
    {"type": "ByteFallback"}, {"type": "Fuse"}]}, "model": {"byte_fallback": true, )" +
              vocab + "}}" + text,
          std::string(1, '\0') +
              "{{'<|im_start|>system\\nS<|im_end|>'}} last_query_index </think> if "
              "reasoning_content %}",
          std::string(1, '\0') + "{{'[INST] ' + ' [/INST]'}} loop.first and system_message"};
}

std::vector<std::string> fuzz::words() {
  return {"\"type\": \"Split\",",
          "\"type\": \"ByteLevel\",",
          "\"type\": \"NFKC\",",
          "\"type\": \"Metaspace\",",
          "\"type\": \"Whitespace\"",
          "\"type\": \"Punctuation\"",
          "\"type\": \"WhitespaceSplit\"",
          "\"prepend_scheme\": \"never\"",
          "\"behavior\": \"MergedWithNext\"",
          "\"behavior\": \"Contiguous\"",
          "\"behavior\": \"Removed\"",
          "\"invert\": true",
          "\"normalized\": true",
          "\"byte_fallback\": true,",
          "\"stop\": 3",
          "(a+)+$",
          "(?:a|a)*",
          "(?!\\\\S)",
          "\\\\p{Han}",
          "\\\\W",
          "[^\\\\s]",
          "{,3}",
          "{2}+",
          "&&",
          "(?R)",
          "2147483648",
          "4194303",
          "-1",
          "null",
          "true",
          "\\u0000",
          "\\ud83d\\ude00",
          "\xCC\x81",
          "\xE1\x84\x80\xE1\x85\xA1",
          "\xF0\x9F\x98",
          "<0xFF>",
          "<x>",
          std::string(2000, '['),
          std::string(300, 'a'),
          "\"\"",
          "[]",
          "{}"};
}

#include <set>
#include <unordered_set>

#include "base/error.h"
#include "model/model_source.h"
#include "model/strict_json.h"

namespace lockstep::model {

using base::fail;
using base::InputError;
using nlohmann::json;

namespace {

// Kinds in tokenizer.ggml.token_type.
enum TokenType {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6
};

json byte_level(bool use_regex) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", false},
          {"trim_offsets", true},
          {"use_regex", use_regex}};
}

json split(const char* pattern) {
  return {{"type", "Split"},
          {"pattern", {{"Regex", pattern}}},
          {"behavior", "Isolated"},
          {"invert", false}};
}

json sequence(const json& first, const json& second) {
  return {{"type", "Sequence"}, {"pretokenizers", {first, second}}};
}

// What tokenizer.ggml.pre stands for: the pre-tokenizer of the tokenizer.json that llama.cpp's
// converter recognised, and its normalizer.
struct PreTokenizer {
  const char* name;
  json pre_tokenizer;
  json normalizer;
  bool ignore_merges = false;
};
std::vector<PreTokenizer> pre_tokenizers() {
  return {
      {"gpt-2", byte_level(true), nullptr},
      {"smollm", sequence({{"type", "Digits"}, {"individual_digits", true}}, byte_level(true)),
       nullptr},
      {"llama-bpe",
       sequence(split("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| "
                      "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"),
                byte_level(false)),
       nullptr, true},
      {"qwen2",
       sequence(split("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| "
                      "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"),
                byte_level(false)),
       {{"type", "NFC"}}},
  };
}

PreTokenizer find_pre_tokenizer(const GgufFile& f) {
  const GgufValue* value = f.find("tokenizer.ggml.pre", GgufKind::kText);
  const std::string_view name = value == nullptr ? "gpt-2" : value->text;
  std::string known;
  for (const PreTokenizer& p : pre_tokenizers()) {
    if (name == p.name) return p;
    known += fmt::format(" {}", p.name);
  }
  fail<InputError>("{}: key 'tokenizer.ggml.pre': '{}' is not supported; supported:{}", f.file,
                   name, known);
}

// The vocabulary, and the added tokens in order of their ids.
void read_tokens(const GgufFile& f, json& vocab, json& added) {
  const auto& tokens = f.at("tokenizer.ggml.tokens", GgufKind::kTexts).texts;
  const GgufValue* types = f.find("tokenizer.ggml.token_type", GgufKind::kIntegers);
  if (types != nullptr && types->integers.size() != tokens.size())
    fail<InputError>("{}: key 'tokenizer.ggml.token_type': {} types for {} tokens", f.file,
                     types->integers.size(), tokens.size());
  for (std::size_t id = 0; id < tokens.size(); ++id) {
    const std::int64_t type = types == nullptr ? std::int64_t{kNormal} : types->integers[id];
    if (type == kUnused) continue;
    const std::string text(tokens[id]);
    if (text.empty() || vocab.contains(text))
      fail<InputError>("{}: key 'tokenizer.ggml.tokens': token {} is {}", f.file, id,
                       text.empty() ? "empty" : "'" + text + "', which is there twice");
    vocab[text] = id;
    if (type == kNormal) continue;
    if (type != kControl && type != kUserDefined && type != kUnknown)
      fail<InputError>("{}: key 'tokenizer.ggml.token_type': type {} of token {} is not supported",
                       f.file, type, id);
    added.push_back({{"id", id},
                     {"content", text},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", type != kUserDefined}});
  }
}

json read_merges(const GgufFile& f, const json& vocab) {
  json merges = json::array();
  for (const std::string_view merge : f.at("tokenizer.ggml.merges", GgufKind::kTexts).texts) {
    const std::size_t space = merge.find(' ', 1);
    const std::string left(merge.substr(0, space));
    const std::string right(space == std::string_view::npos ? "" : merge.substr(space + 1));
    if (right.empty() || !vocab.contains(left) || !vocab.contains(right) ||
        !vocab.contains(left + right))
      fail<InputError>("{}: key 'tokenizer.ggml.merges': '{}' does not join two tokens to a third",
                       f.file, merge);
    merges.push_back(merge);
  }
  return merges;
}

// The text of the token that a key names; null without the key.
json token_text(const GgufFile& f, const char* key) {
  const std::int64_t id = f.integer(key, -1);
  const auto& tokens = f.at("tokenizer.ggml.tokens", GgufKind::kTexts).texts;
  if (id < 0) return nullptr;
  if (static_cast<std::size_t>(id) >= tokens.size())
    fail<InputError>("{}: key '{}': token {} of {}", f.file, key, id, tokens.size());
  return tokens[static_cast<std::size_t>(id)];
}

bool flag(const GgufFile& f, const char* key) {
  const GgufValue* value = f.find(key, GgufKind::kBool);
  return value != nullptr && value->integer != 0;
}

// Puts the beginning-of-sequence token before every text.
json begin_with(const json& text, std::int64_t id) {
  const json special = {{"SpecialToken", {{"id", text}, {"type_id", 0}}}};
  const auto sequence = [](const char* name, int type) {
    return json{{"Sequence", {{"id", name}, {"type_id", type}}}};
  };
  const json second = {{"SpecialToken", {{"id", text}, {"type_id", 1}}}};
  return {{"type", "TemplateProcessing"},
          {"single", {special, sequence("A", 0)}},
          {"pair", {special, sequence("A", 0), second, sequence("B", 1)}},
          {"special_tokens",
           {{text.get<std::string>(), {{"id", text}, {"ids", {id}}, {"tokens", {text}}}}}}};
}

json tokenizer_json(const GgufFile& f) {
  const PreTokenizer pre = find_pre_tokenizer(f);
  json vocab = json::object(), added = json::array();
  read_tokens(f, vocab, added);
  json merges = read_merges(f, vocab);
  json post = nullptr;
  if (flag(f, "tokenizer.ggml.add_bos_token")) {
    const json bos = token_text(f, "tokenizer.ggml.bos_token_id");
    if (bos.is_null()) fail<InputError>("{}: key 'tokenizer.ggml.bos_token_id' is missing", f.file);
    post = begin_with(bos, f.integer("tokenizer.ggml.bos_token_id"));
  }
  if (flag(f, "tokenizer.ggml.add_eos_token"))
    fail<InputError>("{}: key 'tokenizer.ggml.add_eos_token': true is not supported", f.file);
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", std::move(added)},
          {"normalizer", pre.normalizer},
          {"pre_tokenizer", pre.pre_tokenizer},
          {"post_processor", std::move(post)},
          {"decoder", byte_level(true)},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"ignore_merges", pre.ignore_merges},
            {"vocab", std::move(vocab)},
            {"merges", std::move(merges)}}}};
}

}  // namespace

std::map<std::string, std::string> gguf_tokenizer_files(const GgufFile& f) {
  const std::string_view model = f.at("tokenizer.ggml.model", GgufKind::kText).text;
  if (model != "gpt2")
    fail<InputError>("{}: key 'tokenizer.ggml.model': '{}' is not supported, only gpt2", f.file,
                     model);
  json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                 {"add_prefix_space", false},
                 {"clean_up_tokenization_spaces", false},
                 {"bos_token", token_text(f, "tokenizer.ggml.bos_token_id")},
                 {"eos_token", token_text(f, "tokenizer.ggml.eos_token_id")},
                 {"pad_token", token_text(f, "tokenizer.ggml.padding_token_id")},
                 {"unk_token", token_text(f, "tokenizer.ggml.unknown_token_id")}};
  if (const GgufValue* value = f.find("tokenizer.chat_template", GgufKind::kText))
    config["chat_template"] = value->text;
  try {
    return {{"tokenizer.json", json_text(tokenizer_json(f))},
            {"tokenizer_config.json", json_text(config)}};
  } catch (const json::exception& e) {  // text that is no UTF-8
    fail<InputError>("{}: the tokenizer cannot be written as JSON ({})", f.file, e.what());
  }
}

}  // namespace lockstep::model

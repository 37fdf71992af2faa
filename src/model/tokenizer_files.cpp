// The files of a tokenizer, see tokenizer.h.
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file_io.h"
#include "model/json_part.h"
#include "model/strict_json.h"
#include "model/tokenizer_json.h"

namespace lockstep::model {

using nlohmann::json;
namespace fs = std::filesystem;

namespace {

constexpr std::size_t kTokenizerFileLimit = 64 << 20, kConfigFileLimit = 16 << 20;

json byte_tokenizer_json(const Tokenizer& tokenizer) {
  json added = json::array(), vocab = json::object();
  for (const SpecialToken& s : tokenizer.specials)
    added.push_back({{"id", s.id},
                     {"content", s.text},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  for (std::size_t b = 0; b < 256; ++b) vocab[byte_characters()[b]] = b;
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

void write_byte_tokenizer(const Tokenizer& t, const fs::path& folder) {
  const auto text_of = [&](std::int32_t id) { return decode_bytes(t, {id}, false); };
  base::write_file_atomic(folder / "tokenizer.json", json_text(byte_tokenizer_json(t)));
  base::write_file_atomic(folder / "tokenizer_config.json",
                          json_text({{"tokenizer_class", "PreTrainedTokenizerFast"},
                                     {"bos_token", text_of(t.bos_id)},
                                     {"eos_token", text_of(t.eos_id)},
                                     {"pad_token", text_of(t.pad_id)},
                                     {"clean_up_tokenization_spaces", false}}));
}

// The id of a special token that tokenizer_config.json names: null, a text, or an object with
// "content". -1: none.
std::int32_t named_token(const JsonPart& part, const TokenizerPipeline& pipeline) {
  if (part.is_null()) return -1;
  const std::string text = part.value.is_object() ? part["content"].text() : part.text();
  for (const AddedToken& t : pipeline.added.tokens)
    if (t.content == text) return t.id;
  const std::int32_t id = pipeline.bpe.ids.find(text);
  if (id < 0) part.fail(fmt::format("'{}' is no token of tokenizer.json", shown(text)));
  return id;
}

// "chat_template" of tokenizer_config.json: a text, or a list of named ones, of which "default"
// counts.
std::string template_of(const JsonPart& part) {
  if (!part.value.is_array()) return part.text_or("");
  for (std::size_t i = 0; i < part.value.size(); ++i)
    if (part.at(i).object()["name"].text() == "default") return part.at(i)["template"].text();
  return "";
}

}  // namespace

Tokenizer read_tokenizer(const fs::path& path) {
  std::error_code error;
  const bool is_folder = fs::is_directory(path, error);
  const fs::path main_file = is_folder || path.filename().empty() || !fs::exists(path, error)
                                 ? path / "tokenizer.json"
                                 : path;
  auto files = std::make_shared<std::vector<std::pair<std::string, std::string>>>();
  const auto read = [&](const fs::path& file, const char* name, std::size_t limit) {
    files->emplace_back(name, base::read_file(file, limit));
    return files->back().second;
  };
  json document =
      parse_strict_json(read(main_file, "tokenizer.json", kTokenizerFileLimit), main_file.string());
  Tokenizer t = byte_tokenizer();
  if (document == byte_tokenizer_json(t)) return t;
  t = {};
  auto pipeline = std::make_shared<TokenizerPipeline>(read_pipeline(document, main_file.string()));
  document = nullptr;
  t.vocab_size = static_cast<std::int32_t>(pipeline->texts.size());
  for (const AddedToken& token : pipeline->added.tokens)
    if (token.special) t.specials.push_back({token.id, token.content});
  t.pipeline = pipeline;
  std::string chat;
  const fs::path config_file = path / "tokenizer_config.json";
  if (is_folder && fs::exists(config_file, error)) {
    const json config = parse_strict_json(
        read(config_file, "tokenizer_config.json", kConfigFileLimit), config_file.string());
    const std::string name = config_file.string();
    const JsonPart top{config, name, ""};
    t.bos_id = named_token(top["bos_token"], *pipeline);
    t.eos_id = named_token(top["eos_token"], *pipeline);
    t.pad_id = named_token(top["pad_token"], *pipeline);
    chat = template_of(top["chat_template"]);
  }
  if (is_folder && fs::exists(path / "special_tokens_map.json", error))
    read(path / "special_tokens_map.json", "special_tokens_map.json", kConfigFileLimit);
  if (is_folder && fs::exists(path / "chat_template.jinja", error))
    chat = read(path / "chat_template.jinja", "chat_template.jinja", kConfigFileLimit);
  t.chat_template = recognise_chat_template(chat);
  t.chat_template.file = path.string();
  t.files = files;
  return t;
}

void write_tokenizer(const Tokenizer& tokenizer, const fs::path& folder) {
  if (!tokenizer.files) return write_byte_tokenizer(tokenizer, folder);
  for (const auto& [name, bytes] : *tokenizer.files) base::write_file_atomic(folder / name, bytes);
}

}  // namespace lockstep::model

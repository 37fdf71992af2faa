// Reads the BPE model of a tokenizer.json, see bpe.h.
#include <fmt/format.h>

#include "model/bpe.h"
#include "model/json_part.h"
#include "model/unicode_text.h"

namespace lockstep::model {

namespace {

constexpr std::int32_t kMaxId = (1 << 22) - 1;  // the largest vocabularies in use have 2^18

void read_vocabulary(const JsonPart& vocab, Bpe& bpe) {
  bpe.size = vocab.object().value.size();
  bpe.ids = StringTable(bpe.size);
  std::vector<bool> taken;
  for (const auto& [text, value] : vocab.value.items()) {
    const JsonPart part{value, vocab.file, fmt::format("{}['{}']", vocab.path, shown(text))};
    const auto id = static_cast<std::size_t>(part.integer(0, kMaxId));
    if (id >= bpe.texts.size()) {
      bpe.texts.resize(id + 1);
      taken.resize(id + 1);
    }
    if (taken[id]) part.fail(fmt::format("id {} is also that of '{}'", id, shown(bpe.texts[id])));
    taken[id] = true;
    bpe.texts[id] = text;
    bpe.ids.insert(text, static_cast<std::int32_t>(id));
  }
}

// "left right" or ["left", "right"].
std::pair<std::string, std::string> halves(const JsonPart& merge) {
  if (merge.value.is_array()) {
    if (merge.value.size() != 2) merge.fail("must be a pair");
    return {merge.at(0).text(), merge.at(1).text()};
  }
  const std::string text = merge.text();
  const std::size_t space = text.find(' ');
  if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos)
    merge.fail(fmt::format("'{}' must be two tokens with one space between", shown(text)));
  return {text.substr(0, space), text.substr(space + 1)};
}

void read_merges(const JsonPart& merges, Bpe& bpe) {
  const std::size_t count = merges.array().value.size();
  bpe.merges = MergeTable(count);
  std::int32_t rank = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const JsonPart merge = merges.at(i);
    if (merge.value.is_string() &&
        merge.value.get_ref<const std::string&>().starts_with("#version"))
      continue;
    const auto [left, right] = halves(merge);
    const auto id_of = [&](const std::string& token) {
      const std::int32_t id = bpe.ids.find(token);
      if (id < 0) merge.fail(fmt::format("'{}' is not in the vocabulary", shown(token)));
      return id;
    };
    const std::int32_t first = id_of(left), second = id_of(right);
    bpe.merges.set(first, second, {rank++, id_of(left + right)});
  }
}

void find_first_symbols(Bpe& bpe) {
  for (std::size_t b = 0; b < 256; ++b) {
    bpe.byte_tokens[b] = bpe.ids.find(fmt::format("<0x{:02X}>", b));
    bpe.first_symbols[b] = bpe.ids.find(byte_characters()[b]);
  }
}

// The words that become one token: all of them with ignore_merges, else those that the merges
// arrive at.
void find_whole_words(Bpe& bpe) {
  StringTable words(bpe.texts.size());
  BpeScratch scratch;
  std::vector<std::int32_t> tokens;
  std::string bytes;
  for (std::size_t id = 0; id < bpe.texts.size(); ++id) {
    std::string_view word = bpe.texts[id];
    if (word.empty() || (bpe.byte_words && !bytes_of_characters(word, bytes))) continue;
    if (bpe.byte_words) word = bytes;
    if (!bpe.ignore_merges) {
      tokens.clear();
      encode_word(bpe, word, scratch, tokens);
      if (tokens.size() != 1 || tokens[0] != static_cast<std::int32_t>(id)) continue;
    }
    words.insert(word, static_cast<std::int32_t>(id));
  }
  bpe.whole_words = std::move(words);
}

}  // namespace

void check_model_type(const nlohmann::json& model, const std::string& file) {
  const JsonPart part{model, file, "model"};
  const std::string type = part.object()["type"].text_or("BPE");
  if (type != "BPE")
    part.fail(fmt::format("type '{}' is not supported; Lockstep reads BPE", shown(type)));
}

Bpe read_bpe(const nlohmann::json& model, bool byte_words, const std::string& file) {
  const JsonPart part{model, file, "model"};
  check_model_type(model, file);
  part.only({"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
             "fuse_unk", "byte_fallback", "ignore_merges", "vocab", "merges"});
  const JsonPart dropout = part["dropout"];
  if (!dropout.is_null() && dropout.value != 0)
    dropout.fail("is not supported: the tokens of a text would be drawn at random");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (!part[key].text_or("").empty()) part[key].fail("is not supported");
  Bpe bpe;
  bpe.where = file;
  bpe.byte_words = byte_words;
  bpe.fuse_unknown = part["fuse_unk"].flag(false);
  bpe.byte_fallback = part["byte_fallback"].flag(false);
  bpe.ignore_merges = part["ignore_merges"].flag(false);
  read_vocabulary(part["vocab"], bpe);
  read_merges(part["merges"], bpe);
  find_first_symbols(bpe);
  find_whole_words(bpe);
  // Last: a token whose characters are missing must not stop the loading.
  bpe.unknown_text = part["unk_token"].text_or("");
  bpe.unknown = bpe.unknown_text.empty() ? -1 : bpe.ids.find(bpe.unknown_text);
  return bpe;
}

}  // namespace lockstep::model

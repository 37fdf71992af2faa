#include "model/added_tokens.h"

#include <set>

namespace lockstep::model {

namespace {

constexpr std::size_t kMaxContent = 1024;
constexpr std::int32_t kMaxId = (1 << 22) - 1;

// \w of Rust's regex crate.
constexpr const char* kWordCharacter = R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200C}\x{200D}])";

// Where the white space at the end of `text` begins.
std::size_t trailing_space(std::string_view text) {
  std::size_t end = text.size();
  while (end > 0) {
    std::size_t begin = end - 1;
    while ((static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80) --begin;
    std::size_t at = begin;
    if (!is_white_space(next_code_point(text, at))) break;
    end = begin;
  }
  return end;
}

std::size_t leading_space(std::string_view text) {
  std::size_t end = 0;
  for (std::size_t at = 0; at < text.size(); end = at)
    if (!is_white_space(next_code_point(text, at))) break;
  return end;
}

bool is_word_character(const AddedTokens& added, std::string_view text, std::size_t begin,
                       RegexScratch& scratch) {
  std::size_t end = begin;
  next_code_point(text, end);
  std::string storage;
  Match m;
  return added.word_character->find(with_stand_ins(text.substr(begin, end - begin), storage), 0, m,
                                    scratch);
}

bool stands_alone(const AddedTokens& added, std::string_view text, std::size_t begin,
                  std::size_t end, RegexScratch& scratch) {
  std::size_t before = begin;
  while (before > 0 && (static_cast<unsigned char>(text[--before]) & 0xC0) == 0x80) continue;
  return (begin == 0 || !is_word_character(added, text, before, scratch)) &&
         (end == text.size() || !is_word_character(added, text, end, scratch));
}

AddedToken read_token(const JsonPart& part) {
  part.only({"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
  AddedToken t;
  t.id = static_cast<std::int32_t>(part["id"].integer(0, kMaxId));
  t.content = part["content"].text();
  t.single_word = part["single_word"].flag(false);
  t.lstrip = part["lstrip"].flag(false);
  t.rstrip = part["rstrip"].flag(false);
  t.special = part["special"].flag(false);
  t.normalized = part["normalized"].flag(!t.special);
  if (t.content.empty()) part["content"].fail("must not be empty");
  if (t.content.size() > kMaxContent)
    part["content"].fail(fmt::format("has {} bytes, over {}", t.content.size(), kMaxContent));
  return t;
}

}  // namespace

TokenTrie::TokenTrie() : nodes_(1) {}

void TokenTrie::add(std::string_view content, int token) {
  if (content.empty()) return;
  starts_[static_cast<unsigned char>(content[0])] = true;
  std::size_t at = 0;
  for (const char c : content) {
    int child = nodes_[at].child;
    while (child >= 0 && nodes_[static_cast<std::size_t>(child)].byte != c)
      child = nodes_[static_cast<std::size_t>(child)].sibling;
    if (child < 0) {
      child = static_cast<int>(nodes_.size());
      nodes_.push_back({-1, nodes_[at].child, -1, c});
      nodes_[at].child = child;
    }
    at = static_cast<std::size_t>(child);
  }
  if (nodes_[at].token < 0) nodes_[at].token = token;
}

int TokenTrie::longest_at(std::string_view text, std::size_t at, std::size_t& length) const {
  int found = -1;
  std::size_t node = 0;
  for (std::size_t i = at; i < text.size(); ++i) {
    int child = nodes_[node].child;
    while (child >= 0 && nodes_[static_cast<std::size_t>(child)].byte != text[i])
      child = nodes_[static_cast<std::size_t>(child)].sibling;
    if (child < 0) break;
    node = static_cast<std::size_t>(child);
    if (nodes_[node].token < 0) continue;
    found = nodes_[node].token;
    length = i + 1 - at;
  }
  return found;
}

AddedTokens read_added_tokens(const JsonPart& part, const Bpe& bpe, const Normalizer& normalizer) {
  AddedTokens out;
  if (part.is_null()) return out;
  std::set<std::int32_t> ids;
  std::set<std::string> contents;
  RegexScratch scratch;
  std::string storage;
  bool single_word = false;
  const auto words = static_cast<std::int32_t>(bpe.size);
  std::int32_t next_id = words;
  for (std::size_t i = 0; i < part.array().value.size(); ++i) {
    const JsonPart item = part.at(i);
    AddedToken t = read_token(item);
    if (!ids.insert(t.id).second) item.fail(fmt::format("id {} twice", t.id));
    if (!contents.insert(t.content).second) item.fail(fmt::format("'{}' twice", shown(t.content)));
    const std::int32_t known = bpe.ids.find(t.content);
    // `tokenizers` numbers new tokens by their order, whatever the file says.
    const std::int32_t given = known >= 0 ? known : next_id;
    if (t.id != given)
      item.fail(fmt::format("'{}' has id {}, but by its place in the file it gets {}",
                            shown(t.content), t.id, given));
    next_id = std::max(next_id, given >= words ? given + 1 : 0);
    const int index = static_cast<int>(out.tokens.size());
    if (t.normalized) {
      t.text = normalize(normalizer, t.content, storage, scratch);
      out.normalized.add(t.text, index);
    } else {
      t.text = t.content;
      out.raw.add(t.content, index);
    }
    single_word |= t.single_word;
    out.tokens.push_back(std::move(t));
  }
  if (single_word) out.word_character.emplace(kWordCharacter, part.file);
  return out;
}

void split_at_tokens(const AddedTokens& added, const TokenTrie& trie, std::string_view text,
                     bool special, RegexScratch& scratch,
                     const std::function<void(std::string_view)>& other,
                     const std::function<void(std::int32_t)>& token) {
  std::size_t last = 0, length = 0;
  for (std::size_t at = 0; at < text.size() && !trie.empty();) {
    const int found = trie.can_start(text[at]) ? trie.longest_at(text, at, length) : -1;
    if (found < 0) {
      ++at;
      continue;
    }
    const AddedToken& t = added.tokens[static_cast<std::size_t>(found)];
    std::size_t begin = at, end = at + length;
    at = end;
    if (t.special && !special) continue;
    if (t.single_word && !stands_alone(added, text, begin, end, scratch)) continue;
    if (t.lstrip) begin = std::max(trailing_space(text.substr(0, begin)), last);
    if (t.rstrip) end += leading_space(text.substr(end));
    if (last < begin) other(text.substr(last, begin - last));
    token(t.id);
    last = end;
  }
  if (last < text.size()) other(text.substr(last));
}

}  // namespace lockstep::model

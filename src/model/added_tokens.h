// Tokens that are found in the text before anything else happens to it: added_tokens of a
// tokenizer.json.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "model/bpe.h"
#include "model/json_part.h"
#include "model/normalizer.h"
#include "model/regex.h"

namespace lockstep::model {

struct AddedToken {
  std::int32_t id = -1;
  std::string content;                  // as written
  std::string text;                     // as searched and decoded: normalized where `normalized`
  bool single_word = false;             // only where no word character touches it
  bool lstrip = false, rstrip = false;  // takes the white space before, behind it
  bool normalized = false;              // found in the normalized text, its content normalized, too
  bool special = false;
};

// Finds the longest token at the leftmost place.
class TokenTrie {
 public:
  TokenTrie();
  void add(std::string_view content, int token);
  bool empty() const { return nodes_.size() == 1; }
  // The token that starts at `at` and its length; -1: none.
  int longest_at(std::string_view text, std::size_t at, std::size_t& length) const;
  bool can_start(char c) const { return starts_[static_cast<unsigned char>(c)]; }

 private:
  struct Node {
    int child = -1, sibling = -1, token = -1;
    char byte = 0;
  };
  std::vector<Node> nodes_;
  std::array<bool, 256> starts_{};
};

struct AddedTokens {
  std::vector<AddedToken> tokens;
  TokenTrie raw, normalized;
  std::optional<Regex> word_character;  // there when a token has single_word
};

// Ids: those of the vocabulary for contents it has, else the next free one from the size of the
// vocabulary on; the file must agree. InputError naming the token where it does not, for an id
// taken twice, and for contents that are empty, appear twice or exceed 1024 bytes.
AddedTokens read_added_tokens(const JsonPart& part, const Bpe& bpe, const Normalizer& normalizer);

// Cuts the text at the tokens of one of the tries, in order: other(text) for what lies between
// (never empty), token(id) for each token. With `special` false special tokens are passed over
// where they match, and are text.
void split_at_tokens(const AddedTokens& added, const TokenTrie& trie, std::string_view text,
                     bool special, RegexScratch& scratch,
                     const std::function<void(std::string_view)>& other,
                     const std::function<void(std::int32_t)>& token);

}  // namespace lockstep::model

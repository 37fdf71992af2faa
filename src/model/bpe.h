// The BPE model of a tokenizer.json: words to tokens. Merges happen in the order of their rank,
// then from left to right, as in the Hugging Face `tokenizers` package.
#pragma once

#include <array>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace lockstep::model {

// Strings to ids: open addressing over one block of characters.
class StringTable {
 public:
  explicit StringTable(std::size_t capacity = 0);
  // False when the text is there already (its id stays).
  bool insert(std::string_view text, std::int32_t id);
  // -1: not there.
  std::int32_t find(std::string_view text) const;

 private:
  struct Slot {
    std::uint32_t hash = 0, begin = 0, length = 0;
    std::int32_t id = -1;
  };
  void grow();
  std::vector<Slot> slots_;
  std::size_t used_ = 0;
  std::string characters_;
};

// Pairs of tokens to their merge.
struct Merge {
  std::int32_t rank = kNone;  // kNone: there is none
  std::int32_t id = -1;       // the token they become
  static constexpr std::int32_t kNone = INT32_MAX;
};
class MergeTable {
 public:
  explicit MergeTable(std::size_t merges = 0);
  void set(std::int32_t left, std::int32_t right, Merge merge);  // the last one counts
  Merge find(std::int32_t left, std::int32_t right) const;

 private:
  struct Slot {
    std::uint64_t pair = ~std::uint64_t{0};
    Merge merge;
  };
  std::size_t slot_of(std::uint64_t pair) const;
  std::vector<Slot> slots_;
};

struct Bpe {
  // Token ids and their text as the file writes it (byte-level text in byte_characters()).
  std::vector<std::string> texts;  // of the ids; "" where an id is not taken
  std::size_t size = 0;            // number of tokens
  StringTable ids{0};
  MergeTable merges{0};
  std::int32_t unknown = -1;  // unk_token
  std::string unknown_text;   // as written; unknown is -1 when the vocabulary lacks it
  bool fuse_unknown = false, byte_fallback = false, ignore_merges = false;
  std::array<std::int32_t, 256> byte_tokens;  // "<0x00>" .. "<0xFF>", -1 where missing

  // Words are bytes (the pre-tokenizer ends with ByteLevel) or characters.
  bool byte_words = false;
  std::array<std::int32_t, 256> first_symbols;  // of each byte when byte_words, -1 where missing
  StringTable whole_words{0};  // words that become one token, by their bytes or characters
  std::string where;           // the file, for messages
};

// InputError naming the file and the type when the "model" object is no BPE.
void check_model_type(const nlohmann::json& model, const std::string& file);

// From the "model" object; InputError naming the file and the part that is malformed or not
// supported (another type than BPE, dropout, prefixes and suffixes of subwords).
Bpe read_bpe(const nlohmann::json& model, bool byte_words, const std::string& file);

struct BpeScratch {
  std::vector<std::int32_t> symbols, ranks, merged, next, previous;
  std::vector<std::uint64_t> heap;
};

// Appends the tokens of a word: bytes when byte_words, else well-formed UTF-8. InputError when the
// word needs an unk_token that the vocabulary does not have.
void encode_word(const Bpe& bpe, std::string_view word, BpeScratch& scratch,
                 std::vector<std::int32_t>& tokens);

}  // namespace lockstep::model

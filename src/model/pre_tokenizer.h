// The pre-tokenizer of a tokenizer.json: a normalized text to words, none of which a merge crosses.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "model/json_part.h"
#include "model/normalizer.h"

namespace lockstep::model {

struct PreTokenizerStep {
  enum Kind { kSplit, kByteLevel, kMetaspace };
  enum Behavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };
  enum Prepend { kAlways, kFirst, kNever };
  Kind kind = kSplit;
  Pattern pattern;                // of kSplit; of the others when split_first
  Behavior behavior = kIsolated;  // of kSplit
  bool invert = false;            // of kSplit: the pattern describes what lies between
  bool stand_ins = true;          // of kSplit: the pattern asks for properties of characters
  bool add_prefix_space = false;  // of kByteLevel
  bool split_first = false;       // of kByteLevel: use_regex; of kMetaspace: split
  std::string space;              // of kMetaspace: the character that stands for a blank
  Prepend prepend = kAlways;      // of kMetaspace; kFirst: where the whole text begins
};

// Digits, Punctuation, Whitespace, WhitespaceSplit and CharDelimiterSplit are Splits.
struct PreTokenizer {
  std::vector<PreTokenizerStep> steps;
  // The last step is ByteLevel: words come as bytes rather than as the characters for them.
  bool byte_words() const {
    return !steps.empty() && steps.back().kind == PreTokenizerStep::kByteLevel;
  }
};

// Null gives no steps: the whole text is one word. Split, Digits, ByteLevel, Metaspace,
// Punctuation, Whitespace, WhitespaceSplit, CharDelimiterSplit, Sequence; any other type is an
// InputError that names it.
PreTokenizer read_pre_tokenizer(const JsonPart& part);

// Calls word(text) for each word, none of them empty. The text must be well-formed UTF-8. `first`:
// it begins where the text that is encoded begins, not behind a token.
void pre_tokenize(const PreTokenizer& pre, std::string_view text, bool first, RegexScratch& scratch,
                  const std::function<void(std::string_view)>& word);

// Whether one of the steps asks where the text begins.
bool asks_for_first(const PreTokenizer& pre);

}  // namespace lockstep::model

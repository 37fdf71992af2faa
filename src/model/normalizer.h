// The normalizer of a tokenizer.json: what happens to a text before it is split.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "model/json_part.h"
#include "model/regex.h"
#include "model/unicode_text.h"

namespace lockstep::model {

// A fixed text or a regular expression, as "pattern" in tokenizer.json has it:
// {"String": ..} or {"Regex": ..}.
struct Pattern {
  std::string text;
  std::optional<Regex> regex;

  // Calls each(begin, end) for all matches, left to right, without overlap.
  template <typename Each>
  void for_each(std::string_view in, RegexScratch& scratch, const Each& each) const {
    if (regex) return regex->for_each(in, scratch, each);
    for (std::size_t at = in.find(text); at != std::string_view::npos;
         at = in.find(text, at + text.size()))
      each(at, at + text.size());
  }
};
Pattern read_pattern(const JsonPart& part);

// `in` with each match replaced.
std::string replaced(const Pattern& pattern, const std::string& content, std::string_view in,
                     RegexScratch& scratch);

struct NormalizerStep {
  enum Kind { kForm, kLowercase, kPrepend, kReplace, kStrip };
  Kind kind;
  NormalForm form = NormalForm::kNfc;
  Pattern pattern;                   // of kReplace
  std::string content;               // of kPrepend, kReplace
  bool left = false, right = false;  // of kStrip
};

struct Normalizer {
  std::vector<NormalizerStep> steps;
};

// Null gives no steps. NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace, Strip, Sequence; any
// other type is an InputError that names it.
Normalizer read_normalizer(const JsonPart& part);

// The normalized text; `text` itself where nothing changes, else a view of `storage`.
std::string_view normalize(const Normalizer& normalizer, std::string_view text,
                           std::string& storage, RegexScratch& scratch);

}  // namespace lockstep::model

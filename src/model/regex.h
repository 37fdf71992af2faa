// Regular expressions of tokenizer.json: written for Oniguruma, run by PCRE2 (UTF-8, Unicode
// properties, JIT).
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

namespace lockstep::model {

// What one caller needs while it matches; not for two threads at once.
struct RegexScratch {
  RegexScratch();
  ~RegexScratch();
  RegexScratch(const RegexScratch&) = delete;
  RegexScratch& operator=(const RegexScratch&) = delete;

  struct State;
  std::unique_ptr<State> state;
};

struct Match {
  std::size_t begin, end;
};

// The pattern in PCRE2's syntax. \s, \w, \d, \b and their opposites get Oniguruma's sets, \h is a
// hexadecimal digit, scripts are Script (not Script_Extensions), ^ and $ are those of lines.
// InputError (naming `where`) for what the two engines read differently and this does not
// translate: nested classes and && in them, \W and \B-like sets inside classes, {n}+, inline flags
// other than i, groups that call, recurse or branch on conditions, verbs.
std::string pcre2_pattern(std::string_view pattern, const std::string& where);

class Regex {
 public:
  // InputError naming `where` (file and part) when the pattern does not compile.
  Regex(std::string_view pattern, std::string where);
  ~Regex();
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;

  // The leftmost match at `from` or later; look-behind sees all of `text`, which must be
  // well-formed UTF-8. InputError when the search takes too many steps (a catastrophic pattern).
  bool find(std::string_view text, std::size_t from, Match& match, RegexScratch& scratch) const;

  // Calls each(begin, end) for all matches, left to right, without overlap; an empty match that
  // touches the match before it is passed over (as Oniguruma's iterator does).
  template <typename Each>
  void for_each(std::string_view text, RegexScratch& scratch, const Each& each) const {
    std::size_t from = 0, last_end = std::string_view::npos;
    Match m{};
    while (from <= text.size() && find(text, from, m, scratch)) {
      if (m.begin == m.end && m.end == last_end) {
        from += from < text.size() ? character_length(text[from]) : 1;
        continue;
      }
      from = last_end = m.end;
      each(m.begin, m.end);
    }
  }

 private:
  static std::size_t character_length(char lead) {
    const auto b = static_cast<unsigned char>(lead);
    return b < 0xC0 ? 1 : b < 0xE0 ? 2 : b < 0xF0 ? 3 : 4;
  }

  struct Code;
  std::unique_ptr<Code> code_;
  std::string pattern_, where_;
};

}  // namespace lockstep::model

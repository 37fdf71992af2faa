// From Oniguruma's syntax to PCRE2's, see regex.h.
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <cctype>

#include "base/error.h"
#include "model/regex.h"

namespace lockstep::model {

namespace {

// Oniguruma's sets of UTF-8, to stand inside a class.
constexpr std::string_view kSpace = "\\p{White_Space}";
constexpr std::string_view kWord =
    "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{B2}\\x{B3}\\x{B9}\\x{BC}-\\x{BE}";
constexpr std::string_view kDigit = "\\p{Nd}";
constexpr std::string_view kHex = "0-9A-Fa-f";

bool compiles(const std::string& pattern) {
  int error = 0;
  PCRE2_SIZE at = 0;
  pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                   PCRE2_UTF | PCRE2_UCP, &error, &at, nullptr);
  pcre2_code_free(code);
  return code != nullptr;
}

struct Translation {
  std::string_view pattern;
  const std::string& where;
  std::size_t at = 0;
  std::string out;

  [[noreturn]] void refuse(std::string_view what) const {
    base::fail<base::InputError>("{}: the regular expression '{}' uses {}, which is not supported",
                                 where, pattern, what);
  }
  char peek(std::size_t ahead = 0) const {
    return at + ahead < pattern.size() ? pattern[at + ahead] : '\0';
  }

  // "name}" behind "\p{" or "\P{".
  void property(char letter) {
    const std::size_t end = pattern.find('}', at);
    if (end == std::string_view::npos || end - at > 64) refuse("a property without '}'");
    std::string name(pattern.substr(at, end - at));
    at = end + 1;
    const std::string script = "\\" + std::string(1, letter) + "{sc:" + name + "}";
    const bool general_category = name.size() <= 2;
    out += !general_category && compiles(script) ? script
                                                 : "\\" + std::string(1, letter) + "{" + name + "}";
  }

  void escape(bool in_class) {
    if (++at >= pattern.size()) refuse("a backslash at its end");
    const char c = pattern[at++];
    const auto set = [&](std::string_view members, bool negative) {
      if (in_class && negative) refuse(fmt::format("\\{} inside a class", c));
      out += in_class ? std::string(members) : (negative ? "[^" : "[") + std::string(members) + "]";
    };
    switch (c) {
      case 's':
        return set(kSpace, false);
      case 'S':
        out += "\\P{White_Space}";
        return;
      case 'w':
        return set(kWord, false);
      case 'W':
        return set(kWord, true);
      case 'd':
        return set(kDigit, false);
      case 'D':
        out += "\\P{Nd}";
        return;
      case 'h':
        return set(kHex, false);
      case 'H':
        return set(kHex, true);
      case 'b':
      case 'B': {
        if (in_class) refuse(fmt::format("\\{} inside a class", c));
        const std::string w = "[" + std::string(kWord) + "]";
        const bool edge = c == 'b';
        out += "(?:(?<=" + w + ")(?" + (edge ? "!" : "=") + w + ")|(?<!" + w + ")(?" +
               (edge ? "=" : "!") + w + "))";
        return;
      }
      case 'p':
      case 'P':
        if (peek() != '{') refuse(fmt::format("\\{} without '{{'", c));
        ++at;
        return property(c);
      case 'u': {
        const std::string_view digits = pattern.substr(at, 4);
        if (digits.size() < 4 ||
            digits.find_first_not_of("0123456789abcdefABCDEF") != std::string_view::npos)
          refuse("\\u without four hexadecimal digits");
        at += 4;
        out += "\\x{" + std::string(digits) + "}";
        return;
      }
      case 'x':
      case 'n':
      case 'r':
      case 't':
      case 'f':
      case 'v':
      case 'a':
      case 'e':
        // \v is a vertical tab here, a class there.
        out += c == 'v' ? "\\x0B" : std::string("\\") + c;
        return;
      case 'A':
      case 'z':
      case 'Z':
        if (in_class) refuse(fmt::format("\\{} inside a class", c));
        out += std::string("\\") + c;
        return;
      default:
        break;
    }
    if (std::isalnum(static_cast<unsigned char>(c))) refuse(fmt::format("\\{}", c));
    out += '\\';
    out += c;
  }

  void character_class() {
    out += pattern[at++];  // [
    if (peek() == '^') out += pattern[at++];
    if (peek() == ']') refuse("a class that starts with ']'");
    for (;;) {
      if (at >= pattern.size()) refuse("a class without ']'");
      const char c = peek();
      if (c == ']') break;
      if (c == '\\') {
        escape(true);
      } else if (c == '[') {
        refuse(peek(1) == ':' ? "a POSIX class" : "a class within a class");
      } else if (c == '&' && peek(1) == '&') {
        refuse("&& in a class");
      } else {
        out += pattern[at++];
      }
    }
    out += pattern[at++];
  }

  void group() {  // at "("
    if (peek(1) == '*') refuse("a verb (*...)");
    if (peek(1) != '?') {
      out += pattern[at++];
      return;
    }
    const std::string_view rest = pattern.substr(at + 2, 2);
    for (const std::string_view known : {":", "=", "!", ">", "<=", "<!"})
      if (rest.starts_with(known)) {
        out += pattern.substr(at, 2 + known.size());
        at += 2 + known.size();
        return;
      }
    for (const std::string_view flags : {"i:", "-i:", "i)", "-i)"})
      if (pattern.substr(at + 2).starts_with(flags)) {
        out += pattern.substr(at, 2 + flags.size());
        at += 2 + flags.size();
        return;
      }
    refuse(fmt::format("the group '{}'", pattern.substr(at, 4)));
  }

  void brace() {  // at "{": {n}, {n,}, {,m}, {n,m} repeat; anything else is the character
    std::size_t i = at + 1;
    while (std::isdigit(static_cast<unsigned char>(i < pattern.size() ? pattern[i] : 'x'))) ++i;
    const std::size_t first_end = i;
    if (i < pattern.size() && pattern[i] == ',') ++i;
    while (std::isdigit(static_cast<unsigned char>(i < pattern.size() ? pattern[i] : 'x'))) ++i;
    if (i >= pattern.size() || pattern[i] != '}' || i == at + 1 ||
        (i == at + 2 && first_end == at + 1)) {
      out += "\\{";
      ++at;
      return;
    }
    out += first_end == at + 1 ? "{0" : "{";
    out += pattern.substr(at + 1, i - at);
    at = i + 1;
    if (peek() == '+') refuse("'+' behind '{...}'");
  }
};

}  // namespace

std::string pcre2_pattern(std::string_view pattern, const std::string& where) {
  Translation t{pattern, where, 0, {}};
  if (pattern.size() > (64 << 10))
    base::fail<base::InputError>("{}: a regular expression of {} bytes, over 64 KiB", where,
                                 pattern.size());
  while (t.at < pattern.size()) {
    const char c = t.peek();
    if (c == '\\') {
      t.escape(false);
    } else if (c == '[') {
      t.character_class();
    } else if (c == '(') {
      t.group();
    } else if (c == '{') {
      t.brace();
    } else {
      t.out += pattern[t.at++];
    }
  }
  return t.out;
}

}  // namespace lockstep::model

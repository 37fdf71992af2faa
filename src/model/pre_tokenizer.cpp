#include "model/pre_tokenizer.h"

#include <algorithm>

#include "model/unicode_tables.h"

namespace lockstep::model {

namespace {

using Step = PreTokenizerStep;

// GPT-2's, which ByteLevel brings along.
constexpr const char* kByteLevelPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// Numerals of Unicode 17 that no stand-in covers stand here for themselves.
constexpr const char* kNumeral = R"([\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}])";

// Words, and runs of what is neither word nor white space: Whitespace, with \w of Rust's regex
// crate.
constexpr const char* kWords =
    R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200C}\x{200D}]+|[^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200C}\x{200D}\s]+)";

Step::Prepend read_prepend(const JsonPart& part) {
  const std::string name = part.text_or("always");
  if (name == "always") return Step::kAlways;
  if (name == "first") return Step::kFirst;
  if (name == "never") return Step::kNever;
  part.fail(fmt::format("'{}' is not one of always, first and never", shown(name)));
}

Step::Behavior read_behavior(const JsonPart& part) {
  const std::string name = part.text();
  if (name == "Isolated") return Step::kIsolated;
  if (name == "Removed") return Step::kRemoved;
  if (name == "MergedWithPrevious") return Step::kMergedWithPrevious;
  if (name == "MergedWithNext") return Step::kMergedWithNext;
  if (name == "Contiguous") return Step::kContiguous;
  part.fail(
      fmt::format("'{}' is not supported; Lockstep reads Isolated, Removed, "
                  "MergedWithPrevious, MergedWithNext and Contiguous",
                  shown(name)));
}

struct Piece {
  std::size_t begin, end;
  bool match;
};

// Joins pieces as the behavior says.
std::vector<Piece> joined(const std::vector<Piece>& pieces, Step::Behavior behavior) {
  std::vector<Piece> out;
  bool previous = false;
  if (behavior == Step::kMergedWithNext) {
    for (auto p = pieces.rbegin(); p != pieces.rend(); ++p) {
      if (p->match && !previous && !out.empty()) {
        out.back().begin = p->begin;
      } else {
        out.push_back(*p);
      }
      previous = p->match;
    }
    return {out.rbegin(), out.rend()};
  }
  for (const Piece& p : pieces) {
    const bool join = behavior == Step::kContiguous ? p.match == previous : p.match && !previous;
    if (join && !out.empty()) {
      out.back().end = p.end;
    } else {
      out.push_back(p);
    }
    previous = p.match;
  }
  return out;
}

struct Run {
  const PreTokenizer& pre;
  RegexScratch& scratch;
  const std::function<void(std::string_view)>& word;

  void step(std::size_t i, std::string_view text, bool first) const {
    if (text.empty()) return;
    if (i == pre.steps.size()) return word(text);
    const Step& s = pre.steps[i];
    if (s.kind == Step::kSplit) return split(i, s, text, first);
    if (s.kind == Step::kMetaspace) return metaspace(i, s, text, first);
    std::string storage;
    if (s.add_prefix_space && text.front() != ' ') {
      storage = " ";
      storage += text;
      text = storage;
    }
    if (s.split_first) {
      each_piece(s, text, [&](const Piece& p) {
        bytes(i, text.substr(p.begin, p.end - p.begin), first && p.begin == 0);
      });
    } else {
      bytes(i, text, first);
    }
  }

  // Blanks become `space`; then the text is cut before each of them.
  void metaspace(std::size_t i, const Step& s, std::string_view text, bool first) const {
    std::string with_spaces;
    with_spaces.reserve(text.size() + s.space.size());
    if (!text.starts_with(' ') && !text.starts_with(s.space) &&
        (s.prepend == Step::kAlways || (s.prepend == Step::kFirst && first)))
      with_spaces = s.space;
    for (const char c : text)
      if (c == ' ')
        with_spaces += s.space;
      else
        with_spaces += c;
    const std::string_view all = with_spaces;
    std::size_t begin = 0;
    while (s.split_first) {
      const bool own = all.substr(begin).starts_with(s.space);
      const std::size_t at = all.find(s.space, own ? begin + s.space.size() : begin);
      if (at == std::string_view::npos) break;
      step(i + 1, all.substr(begin, at - begin), first && begin == 0);
      begin = at;
    }
    step(i + 1, all.substr(begin), first && begin == 0);
  }

  // What ByteLevel hands on: bytes when nothing follows, else the characters for them.
  void bytes(std::size_t i, std::string_view text, bool first) const {
    if (i + 1 == pre.steps.size()) return word(text);
    std::string characters;
    for (const char c : text) characters += byte_characters()[static_cast<unsigned char>(c)];
    step(i + 1, characters, first);
  }

  void split(std::size_t i, const Step& s, std::string_view text, bool first) const {
    const auto next = [&](const Piece& p) {
      step(i + 1, text.substr(p.begin, p.end - p.begin), first && p.begin == 0);
    };
    if (s.behavior == Step::kIsolated) return each_piece(s, text, next);
    if (s.behavior == Step::kRemoved)
      return each_piece(s, text, [&](const Piece& p) {
        if (!p.match) next(p);
      });
    std::vector<Piece> pieces;
    each_piece(s, text, [&](const Piece& p) { pieces.push_back(p); });
    for (const Piece& p : joined(pieces, s.behavior)) next(p);
  }

  // Matches and what lies between, left to right.
  template <typename Each>
  void each_piece(const Step& s, std::string_view text, const Each& each) const {
    std::string storage;
    const std::string_view subject =
        s.pattern.regex && s.stand_ins ? with_stand_ins(text, storage) : text;
    std::size_t last = 0;
    s.pattern.for_each(subject, scratch, [&](std::size_t begin, std::size_t end) {
      if (last < begin) each(Piece{last, begin, s.invert});
      each(Piece{begin, end, !s.invert});
      last = end;
    });
    if (last < text.size()) each(Piece{last, text.size(), s.invert});
  }
};

}  // namespace

PreTokenizer read_pre_tokenizer(const JsonPart& part) {
  PreTokenizer out;
  if (part.is_null()) return out;
  const std::string type = part.object()["type"].text();
  const std::string where = part.file + ": " + part.path;
  if (type == "Sequence") {
    part.only({"type", "pretokenizers"});
    const JsonPart members = part["pretokenizers"];
    for (std::size_t i = 0; i < members.array().value.size(); ++i)
      for (Step& s : read_pre_tokenizer(members.at(i)).steps) out.steps.push_back(std::move(s));
    if (out.steps.size() > 64) part.fail("has more than 64 steps");
    // Each makes texts longer, and pieces that are cut again longer still.
    for (const auto& [kind, name] :
         {std::pair(Step::kByteLevel, "ByteLevel"), std::pair(Step::kMetaspace, "Metaspace")})
      if (std::count_if(out.steps.begin(), out.steps.end(),
                        [kind = kind](const Step& s) { return s.kind == kind; }) > 2)
        part.fail(fmt::format("has more than two {} steps", name));
    return out;
  }
  Step step;
  if (type == "Split") {
    part.only({"type", "pattern", "behavior", "invert"});
    step.pattern = read_pattern(part["pattern"]);
    step.behavior = read_behavior(part["behavior"]);
    step.invert = part["invert"].flag(false);
  } else if (type == "Digits") {
    part.only({"type", "individual_digits"});
    step.pattern.regex.emplace(kNumeral, where);
    step.behavior = part["individual_digits"].flag(false) ? Step::kIsolated : Step::kContiguous;
  } else if (type == "ByteLevel") {
    part.only({"type", "add_prefix_space", "trim_offsets", "use_regex"});
    step.kind = Step::kByteLevel;
    step.add_prefix_space = part["add_prefix_space"].flag(true);
    step.split_first = part["use_regex"].flag(true);
    if (step.split_first) step.pattern.regex.emplace(kByteLevelPattern, where);
  } else if (type == "Metaspace") {
    part.only({"type", "replacement", "prepend_scheme", "split", "add_prefix_space", "str_rep"});
    step.kind = Step::kMetaspace;
    step.space = part["replacement"].character();
    step.prepend = read_prepend(part["prepend_scheme"]);
    if (!part["add_prefix_space"].flag(true) && step.prepend != Step::kNever)
      part["add_prefix_space"].fail("false contradicts prepend_scheme");
    step.split_first = part["split"].flag(true);
  } else if (type == "Punctuation") {
    part.only({"type", "behavior"});
    step.pattern.regex.emplace(kPunctuation, where);
    step.stand_ins = false;
    if (!part["behavior"].is_null()) step.behavior = read_behavior(part["behavior"]);
  } else if (type == "Whitespace") {
    part.only({"type"});
    step.pattern.regex.emplace(kWords, where);
    step.behavior = Step::kRemoved;
    step.invert = true;
  } else if (type == "WhitespaceSplit") {
    part.only({"type"});
    step.pattern.regex.emplace(R"(\s)", where);
    step.behavior = Step::kRemoved;
  } else if (type == "CharDelimiterSplit") {
    part.only({"type", "delimiter"});
    step.pattern.text = part["delimiter"].character();
    step.behavior = Step::kRemoved;
  } else {
    part.fail(fmt::format(
        "type '{}' is not supported; Lockstep reads Split, Digits, ByteLevel, "
        "Metaspace, Punctuation, Whitespace, WhitespaceSplit, CharDelimiterSplit and Sequence",
        shown(type)));
  }
  out.steps.push_back(std::move(step));
  return out;
}

void pre_tokenize(const PreTokenizer& pre, std::string_view text, bool first, RegexScratch& scratch,
                  const std::function<void(std::string_view)>& word) {
  Run{pre, scratch, word}.step(0, text, first);
}

bool asks_for_first(const PreTokenizer& pre) {
  return std::any_of(pre.steps.begin(), pre.steps.end(),
                     [](const Step& s) { return s.prepend == Step::kFirst; });
}

}  // namespace lockstep::model

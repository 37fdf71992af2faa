#include "model/normalizer.h"

#include <algorithm>

namespace lockstep::model {

namespace {

constexpr std::size_t kMaxContent = 4096;                 // bytes of a replacement
constexpr std::size_t kMaxText = std::size_t{512} << 20;  // what replacements may make of a text

std::string content_of(const JsonPart& part) {
  std::string content = part.text();
  if (content.size() > kMaxContent)
    part.fail(fmt::format("has {} bytes, over {}", content.size(), kMaxContent));
  return content;
}

std::string_view stripped(std::string_view text, bool left, bool right) {
  if (left)
    for (std::size_t at = 0; at < text.size(); at = 0) {
      if (!is_white_space(next_code_point(text, at))) break;
      text.remove_prefix(at);
    }
  while (right && !text.empty()) {
    std::size_t begin = text.size() - 1;
    while ((static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80) --begin;
    std::size_t at = begin;
    if (!is_white_space(next_code_point(text, at))) break;
    text = text.substr(0, begin);
  }
  return text;
}

// Below U+0300 NFC changes nothing; NFD nothing in ASCII.
bool unchanged(NormalForm form, std::string_view text) {
  const unsigned limit = form == NormalForm::kNfc ? 0xCC : 0x80;
  return std::all_of(text.begin(), text.end(),
                     [limit](char c) { return static_cast<unsigned char>(c) < limit; });
}

}  // namespace

Pattern read_pattern(const JsonPart& part) {
  part.only({"String", "Regex"});
  Pattern pattern;
  if (!part["Regex"].is_null()) {
    pattern.regex.emplace(part["Regex"].text(), part.file + ": " + part.path);
    return pattern;
  }
  pattern.text = part["String"].text();
  if (pattern.text.empty()) part["String"].fail("must not be empty");
  return pattern;
}

std::string replaced(const Pattern& pattern, const std::string& content, std::string_view in,
                     RegexScratch& scratch) {
  std::string out, storage;
  std::size_t last = 0;
  const std::string_view subject = pattern.regex ? with_stand_ins(in, storage) : in;
  pattern.for_each(subject, scratch, [&](std::size_t begin, std::size_t end) {
    out += in.substr(last, begin - last);
    out += content;
    last = end;
    if (out.size() > kMaxText)
      base::fail<base::InputError>("a text grows beyond {} bytes by replacing", kMaxText);
  });
  out += in.substr(last);
  return out;
}

Normalizer read_normalizer(const JsonPart& part) {
  Normalizer out;
  if (part.is_null()) return out;
  const std::string type = part.object()["type"].text();
  using Kind = NormalizerStep::Kind;
  NormalizerStep step{Kind::kForm, NormalForm::kNfc, {}, {}, false, false};
  if (type == "Sequence") {
    part.only({"type", "normalizers"});
    const JsonPart members = part["normalizers"];
    for (std::size_t i = 0; i < members.array().value.size(); ++i)
      for (NormalizerStep& s : read_normalizer(members.at(i)).steps)
        out.steps.push_back(std::move(s));
    if (out.steps.size() > 64) part.fail("has more than 64 steps");
    return out;
  }
  if (type == "NFC" || type == "NFD" || type == "NFKC" || type == "NFKD") {
    part.only({"type"});
    step.form = type == "NFC"    ? NormalForm::kNfc
                : type == "NFD"  ? NormalForm::kNfd
                : type == "NFKC" ? NormalForm::kNfkc
                                 : NormalForm::kNfkd;
  } else if (type == "Lowercase") {
    part.only({"type"});
    step.kind = Kind::kLowercase;
  } else if (type == "Prepend") {
    part.only({"type", "prepend"});
    step.kind = Kind::kPrepend;
    step.content = content_of(part["prepend"]);
  } else if (type == "Replace") {
    part.only({"type", "pattern", "content"});
    step.kind = Kind::kReplace;
    step.pattern = read_pattern(part["pattern"]);
    step.content = content_of(part["content"]);
  } else if (type == "Strip") {
    part.only({"type", "strip_left", "strip_right"});
    step.kind = Kind::kStrip;
    step.left = part["strip_left"].flag(true);
    step.right = part["strip_right"].flag(true);
  } else {
    part.fail(
        fmt::format("type '{}' is not supported; Lockstep reads NFC, NFD, NFKC, NFKD, "
                    "Lowercase, Prepend, Replace, Strip and Sequence",
                    shown(type)));
  }
  out.steps.push_back(std::move(step));
  return out;
}

std::string_view normalize(const Normalizer& normalizer, std::string_view text,
                           std::string& storage, RegexScratch& scratch) {
  for (const NormalizerStep& step : normalizer.steps) {
    using Kind = NormalizerStep::Kind;
    if (text.empty()) return text;
    if (step.kind == Kind::kStrip) {
      text = stripped(text, step.left, step.right);
      continue;
    }
    if (step.kind == Kind::kForm && unchanged(step.form, text)) continue;
    std::string next;
    if (step.kind == Kind::kForm) next = normal_form(text, step.form);
    if (step.kind == Kind::kLowercase) next = lower_case(text);
    if (step.kind == Kind::kPrepend) (next = step.content) += text;
    if (step.kind == Kind::kReplace) next = replaced(step.pattern, step.content, text, scratch);
    storage = std::move(next);
    text = storage;
  }
  return text;
}

}  // namespace lockstep::model

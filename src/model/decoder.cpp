#include "model/decoder.h"

#include "model/unicode_text.h"

namespace lockstep::model {

namespace {

using Kind = DecoderStep::Kind;

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

// The byte of "<0x0A>", or -1. Rust reads the two digits with a sign, so that "+A" is 10.
int fallback_byte(std::string_view text) {
  if (text.size() != 6 || !text.starts_with("<0x") || text[5] != '>') return -1;
  const auto digit = [](char c) {
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                  : -1;
  };
  const int low = digit(text[4]), high = text[3] == '+' ? 0 : digit(text[3]);
  return low < 0 || high < 0 ? -1 : 16 * high + low;
}

std::string run_text(const std::string& bytes) {
  if (is_valid_utf8(bytes)) return bytes;
  std::string out;
  for (std::size_t i = 0; i < bytes.size(); ++i) out += kReplacement;
  return out;
}

void byte_fallback(std::vector<std::string>& texts) {
  std::vector<std::string> out;
  std::string run;
  bool open = false;
  const auto close = [&] {
    if (open) out.push_back(run_text(run));
    run.clear();
    open = false;
  };
  for (std::string& text : texts) {
    if (const int byte = fallback_byte(text); byte >= 0) {
      run += static_cast<char>(byte);
      open = true;
      continue;
    }
    close();
    out.push_back(std::move(text));
  }
  close();
  texts = std::move(out);
}

std::string_view stripped(const DecoderStep& step, std::string_view text) {
  std::size_t start = 0, stop = 0;
  for (; start < step.start && text.starts_with(step.content); ++start)
    text.remove_prefix(step.content.size());
  for (; stop < step.stop && text.ends_with(step.content); ++stop)
    text.remove_suffix(step.content.size());
  return text;
}

std::string bytes_of(std::string_view text) {
  std::string bytes;
  return bytes_of_characters(text, bytes) ? bytes : std::string(text);
}

std::string joined(const std::vector<std::string>& texts) {
  std::string all;
  for (const std::string& text : texts) all += text;
  return all;
}

// Blanks for the character that stands for them; in the first token nothing, where one is put
// before each text.
std::string blanks(const DecoderStep& step, std::string_view text, bool first) {
  std::string out;
  std::size_t last = 0;
  for (std::size_t at = 0; (at = text.find(step.content, last)) != std::string_view::npos;
       last = at + step.content.size()) {
    out += text.substr(last, at - last);
    if (!first || !step.prefix) out += ' ';
  }
  return out += text.substr(last);
}

std::string per_token(const DecoderStep& step, std::string_view text, bool first) {
  if (step.kind == Kind::kStrip) return std::string(stripped(step, text));
  if (step.kind == Kind::kMetaspace) return blanks(step, text, first);
  RegexScratch scratch;
  return replaced(step.pattern, step.content, text, scratch);
}

void apply(const DecoderStep& step, std::vector<std::string>& texts) {
  if (texts.empty() && step.kind != Kind::kFuse && step.kind != Kind::kByteLevel) return;
  if (step.kind == Kind::kByteFallback) return byte_fallback(texts);
  if (step.kind == Kind::kByteLevel) {
    for (std::string& text : texts) text = bytes_of(text);
    texts = {valid_utf8(joined(texts))};
  } else if (step.kind == Kind::kFuse) {
    texts = {joined(texts)};
  } else {
    for (std::string& text : texts) text = per_token(step, text, &text == texts.data());
  }
}

bool is_per_token(const DecoderStep& step) {
  return step.kind == Kind::kReplace || step.kind == Kind::kStrip || step.kind == Kind::kMetaspace;
}

}  // namespace

Decoder read_decoder(const JsonPart& part) {
  Decoder out;
  if (part.is_null()) return out;
  out.spaces = false;
  const std::string type = part.object()["type"].text();
  DecoderStep step;
  if (type == "Sequence") {
    part.only({"type", "decoders"});
    const JsonPart members = part["decoders"];
    for (std::size_t i = 0; i < members.array().value.size(); ++i)
      for (DecoderStep& s : read_decoder(members.at(i)).steps) out.steps.push_back(std::move(s));
    if (out.steps.size() > 64) part.fail("has more than 64 steps");
    return out;
  }
  if (type == "ByteLevel") {
    part.only({"type", "add_prefix_space", "trim_offsets", "use_regex"});
    step.kind = Kind::kByteLevel;
  } else if (type == "ByteFallback") {
    part.only({"type"});
    step.kind = Kind::kByteFallback;
  } else if (type == "Fuse") {
    part.only({"type"});
  } else if (type == "Strip") {
    part.only({"type", "content", "start", "stop"});
    step.kind = Kind::kStrip;
    step.content = part["content"].character();
    step.start = static_cast<std::size_t>(part["start"].integer(0, 1 << 20));
    step.stop = static_cast<std::size_t>(part["stop"].integer(0, 1 << 20));
  } else if (type == "Replace") {
    part.only({"type", "pattern", "content"});
    step.kind = Kind::kReplace;
    step.pattern = read_pattern(part["pattern"]);
    step.content = part["content"].text();
    if (step.content.size() > 4096) part["content"].fail("has more than 4096 bytes");
  } else if (type == "Metaspace") {
    part.only({"type", "replacement", "prepend_scheme", "split", "add_prefix_space", "str_rep"});
    step.kind = Kind::kMetaspace;
    step.content = part["replacement"].character();
    const std::string scheme = part["prepend_scheme"].text_or("always");
    if (scheme != "always" && scheme != "first" && scheme != "never")
      part["prepend_scheme"].fail(
          fmt::format("'{}' is not one of always, first and never", shown(scheme)));
    step.prefix = scheme != "never";
    if (!part["add_prefix_space"].flag(true) && step.prefix)
      part["add_prefix_space"].fail("false contradicts prepend_scheme");
    part["split"].flag(true);
  } else {
    part.fail(
        fmt::format("type '{}' is not supported; Lockstep reads ByteLevel, ByteFallback, "
                    "Fuse, Strip, Replace, Metaspace and Sequence",
                    shown(type)));
  }
  out.steps.push_back(std::move(step));
  return out;
}

std::string decode_texts(const Decoder& decoder, std::vector<std::string> texts) {
  if (decoder.spaces) {
    for (std::size_t i = 1; i < texts.size(); ++i) texts[i].insert(0, " ");
    return joined(texts);
  }
  for (const DecoderStep& step : decoder.steps) apply(step, texts);
  return joined(texts);
}

// Shapes that stream: ByteLevel alone; or any number of Replace, Strip and Metaspace, then perhaps
// ByteFallback, then perhaps Fuse and a Strip that takes from the start alone.
TextStream::TextStream(const Decoder& decoder) : decoder_(decoder), shape_(kWhole) {
  const auto& steps = decoder.steps;
  if (decoder.spaces || steps.empty()) return;
  if (steps.size() == 1 && steps[0].kind == Kind::kByteLevel) {
    shape_ = kBytes;
    return;
  }
  std::size_t i = 0;
  while (i < steps.size() && is_per_token(steps[i])) ++i;
  per_token_ = i;
  fallback_ = i < steps.size() && steps[i].kind == Kind::kByteFallback;
  if (fallback_) ++i;
  if (i < steps.size() && steps[i++].kind != Kind::kFuse) return;
  std::vector<std::size_t> left;
  for (; i < steps.size(); ++i) {
    if (steps[i].kind != Kind::kStrip || steps[i].stop != 0) return;
    left.push_back(steps[i].start);
  }
  // One Strip can be followed character by character; several would need each other's rests.
  if (left.size() > 1) return;
  strip_left_ = left;
  shape_ = kTokens;
}

std::string TextStream::after_fuse(std::string text) {
  if (strip_left_.empty() || text.empty()) return text;
  const std::string& content = decoder_.steps.back().content;
  std::string_view rest = text;
  for (; strip_left_[0] > 0 && rest.starts_with(content); --strip_left_[0])
    rest.remove_prefix(content.size());
  if (!rest.empty()) strip_left_.clear();
  return std::string(rest);
}

std::string TextStream::flush_run() {
  std::string text = run_text(held_);
  held_.clear();
  return text;
}

std::string TextStream::push(std::string_view token_text) {
  if (shape_ == kWhole) {
    texts_.emplace_back(token_text);
    return "";
  }
  if (shape_ == kBytes) {
    held_ += bytes_of(token_text);
    const std::size_t settled = settled_utf8(held_);
    std::string text = valid_utf8(std::string_view(held_).substr(0, settled));
    held_.erase(0, settled);
    return text;
  }
  std::string text(token_text);
  for (std::size_t i = 0; i < per_token_; ++i) text = per_token(decoder_.steps[i], text, first_);
  first_ = false;
  if (const int byte = fallback_ ? fallback_byte(text) : -1; byte >= 0) {
    held_ += static_cast<char>(byte);
    return "";
  }
  return after_fuse(flush_run() + text);
}

std::string TextStream::finish() {
  if (shape_ == kWhole) return decode_texts(decoder_, std::move(texts_));
  if (shape_ == kTokens) return after_fuse(flush_run());
  const std::string text = valid_utf8(held_);
  held_.clear();
  return text;
}

}  // namespace lockstep::model

#include "model/tokenizer.h"

#include <algorithm>

#include "model/tokenizer_json.h"

namespace lockstep::model {

static constexpr int kBytes = 256;

bool Tokenizer::is_special(std::int32_t id) const {
  return std::any_of(specials.begin(), specials.end(),
                     [id](const SpecialToken& s) { return s.id == id; });
}

Tokenizer byte_tokenizer() {
  Tokenizer t;
  t.bos_id = kBytes;
  t.eos_id = kBytes + 1;
  t.pad_id = kBytes + 2;
  t.specials = {{t.bos_id, "<|bos|>"}, {t.eos_id, "<|eos|>"}, {t.pad_id, "<|pad|>"}};
  t.vocab_size = kBytes + 3;
  return t;
}

std::vector<std::int32_t> encode_ordinary(const Tokenizer& tokenizer, std::string_view text) {
  return encode(tokenizer, text, {.special_in_text = false, .add_special = false});
}

std::vector<std::int32_t> encode(const Tokenizer& tokenizer, std::string_view text,
                                 const EncodeOptions& options) {
  std::vector<std::int32_t> tokens;
  if (tokenizer.pipeline) {
    encode_with(*tokenizer.pipeline, text, options, tokens);
    return tokens;
  }
  tokens.reserve(text.size());
  while (!text.empty()) {
    const SpecialToken* special = nullptr;
    if (options.special_in_text)
      for (const SpecialToken& s : tokenizer.specials)
        if (text.starts_with(s.text)) special = &s;
    tokens.push_back(special ? special->id : static_cast<unsigned char>(text.front()));
    text.remove_prefix(special ? special->text.size() : 1);
  }
  return tokens;
}

namespace {

// Null where the token gives nothing.
const std::string* text_of(const TokenizerPipeline& p, std::int32_t id, bool skip_special) {
  if (id < 0 || static_cast<std::size_t>(id) >= p.texts.size()) return nullptr;
  const auto& text = p.texts[static_cast<std::size_t>(id)];
  return text.text.empty() || (skip_special && text.special) ? nullptr : &text.text;
}

}  // namespace

std::string chat_text(const Tokenizer& tokenizer, const std::vector<data::Message>& messages) {
  const auto token = [&](std::int32_t id) -> std::string {
    const auto* text = tokenizer.pipeline ? text_of(*tokenizer.pipeline, id, false) : nullptr;
    return text ? *text : "";
  };
  ChatOptions options;
  options.bos = token(tokenizer.bos_id);
  options.eos = token(tokenizer.eos_id);
  return render_chat(tokenizer.chat_template, messages, options);
}

std::string decode_bytes(const Tokenizer& tokenizer, const std::vector<std::int32_t>& tokens,
                         bool skip_special) {
  if (tokenizer.pipeline) {
    std::vector<std::string> texts;
    for (const std::int32_t id : tokens)
      if (const auto* text = text_of(*tokenizer.pipeline, id, skip_special)) texts.push_back(*text);
    return decode_texts(tokenizer.pipeline->decoder, std::move(texts));
  }
  std::string text;
  for (const std::int32_t id : tokens) {
    if (id >= 0 && id < kBytes) text += static_cast<char>(id);
    if (id < kBytes || skip_special) continue;
    for (const SpecialToken& s : tokenizer.specials)
      if (s.id == id) text += s.text;
  }
  return text;
}

std::string decode(const Tokenizer& tokenizer, const std::vector<std::int32_t>& tokens,
                   bool skip_special) {
  return valid_utf8(decode_bytes(tokenizer, tokens, skip_special));
}

TokenStream::TokenStream(const Tokenizer& tokenizer, bool skip_special)
    : tokenizer_(tokenizer), skip_special_(skip_special) {
  if (tokenizer.pipeline) stream_ = std::make_unique<TextStream>(tokenizer.pipeline->decoder);
}

TokenStream::~TokenStream() = default;

std::string TokenStream::push(std::int32_t token) {
  if (stream_) {
    const std::string* text = text_of(*tokenizer_.pipeline, token, skip_special_);
    return text ? stream_->push(*text) : "";
  }
  bytes_ += decode_bytes(tokenizer_, {token}, skip_special_);
  const std::size_t settled = settled_utf8(bytes_);
  std::string text = valid_utf8(std::string_view(bytes_).substr(0, settled));
  bytes_.erase(0, settled);
  return text;
}

std::string TokenStream::finish() {
  if (stream_) return stream_->finish();
  std::string text = valid_utf8(bytes_);
  bytes_.clear();
  return text;
}

}  // namespace lockstep::model
